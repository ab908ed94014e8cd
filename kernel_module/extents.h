/* SPDX-License-Identifier: GPL-2.0-only */
/* Which pages are free, see extents.c. */
#ifndef _KUCOMMS_EXTENTS_H
#define _KUCOMMS_EXTENTS_H

#include <linux/bitops.h>
#include <linux/rbtree.h>
#include <linux/types.h>

/**
 * struct kucomms_extent - the entry of a page
 * @pages: of a free extent, at its first and at its last page; 0 at all others
 * @other: of whoever has the entries; not looked at
 * @node: of a free extent, at its first page; else not looked at
 */
struct kucomms_extent {
	u64 pages;
	u64 other;
	struct rb_node node;
};

/**
 * struct kucomms_extents - the free extents of some pages
 * @entries: of these pages
 * @page_count: how many
 * @by_size: the extents by their pages, then by their first page
 */
struct kucomms_extents {
	struct kucomms_extent *entries;
	unsigned long page_count;
	struct rb_root by_size;
};

void kucomms_init_extents(struct kucomms_extents *extents,
			  struct kucomms_extent *entries,
			  unsigned long page_count);
unsigned long kucomms_take_extent(struct kucomms_extents *extents,
				  unsigned long count);
void kucomms_free_extent(struct kucomms_extents *extents, unsigned long page,
			 unsigned long count);

#define KUCOMMS_CHUNK		1024UL	/* pages that one bit stands for */
#define KUCOMMS_CHUNKS_MAX	1024	/* so of at most 2^20 pages */

/**
 * struct kucomms_used - which of at most 2^20 pages are used
 * @bits: a bit for each page; from the caller, all 0 at first
 * @chunks: a bit for each whole chunk that was marked at once, instead of its pages'
 */
struct kucomms_used {
	unsigned long *bits;
	unsigned long chunks[BITS_TO_LONGS(KUCOMMS_CHUNKS_MAX)];
};

bool kucomms_find_used(const struct kucomms_used *used, unsigned long first,
		       unsigned long end);
void kucomms_mark_used(struct kucomms_used *used, unsigned long first,
		       unsigned long end, bool are_used);

#endif /* _KUCOMMS_EXTENTS_H */
