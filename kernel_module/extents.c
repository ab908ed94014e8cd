// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which pages are free, in two ways. The caller has the memory and the lock.
 *
 * Where we choose the pages, free ones are extents in a tree: the best fit is found,
 * and what is freed is joined with its neighbours, in a time that grows with the
 * logarithm of their number. The node of an extent is in the entry of its first page,
 * so nothing is allocated. The entry of its last page says how long it is, for what is
 * freed behind it.
 *
 * Where others choose the pages, there is a bit for each page. A buffer of many pages
 * has bits of whole chunks instead, between its two ends. So to mark it takes some 50
 * words at most. To look whether pages are free takes the bits of both kinds.
 */

#include <linux/bitmap.h>
#include <linux/kernel.h>

#include "extents.h"

/* ---- extents ------------------------------------------------------------- */

/* The entries are an array: the order of two is that of their pages. */
static bool is_before(const struct kucomms_extent *a,
		      const struct kucomms_extent *b)
{
	return a->pages < b->pages || (a->pages == b->pages && a < b);
}

static void insert_node(struct rb_root *root, struct kucomms_extent *extent)
{
	struct rb_node **link = &root->rb_node, *parent = NULL;

	while (*link) {
		parent = *link;
		if (is_before(extent, rb_entry(parent, struct kucomms_extent,
					       node)))
			link = &parent->rb_left;
		else
			link = &parent->rb_right;
	}
	rb_link_node(&extent->node, parent, link);
	rb_insert_color(&extent->node, root);
}

static void add_extent(struct kucomms_extents *extents, unsigned long page,
		       unsigned long count)
{
	struct kucomms_extent *first = &extents->entries[page];

	first->pages = count;
	first[count - 1].pages = count;
	insert_node(&extents->by_size, first);
}

/* Return: how many pages it has had. */
static unsigned long remove_extent(struct kucomms_extents *extents,
				   struct kucomms_extent *first)
{
	unsigned long count = first->pages;

	rb_erase(&first->node, &extents->by_size);
	first[count - 1].pages = 0;
	first->pages = 0;
	return count;
}

/* The smallest extent of at least @count pages, or NULL. */
static struct kucomms_extent *
find_extent(const struct kucomms_extents *extents, unsigned long count)
{
	struct rb_node *node = extents->by_size.rb_node;
	struct kucomms_extent *extent, *best = NULL;

	while (node) {
		extent = rb_entry(node, struct kucomms_extent, node);
		if (extent->pages >= count) {
			best = extent;
			node = node->rb_left;
		} else {
			node = node->rb_right;
		}
	}
	return best;
}

/* All pages are free. The entries are all 0. */
void kucomms_init_extents(struct kucomms_extents *extents,
			  struct kucomms_extent *entries,
			  unsigned long page_count)
{
	extents->entries = entries;
	extents->page_count = page_count;
	extents->by_size = RB_ROOT;
	add_extent(extents, 0, page_count);
}

/*
 * Take @count pages in a row. Return: the first of them, page_count when there are
 * none.
 */
unsigned long kucomms_take_extent(struct kucomms_extents *extents,
				  unsigned long count)
{
	struct kucomms_extent *extent = find_extent(extents, count);
	unsigned long page, had;

	if (!extent)
		return extents->page_count;
	page = extent - extents->entries;
	had = remove_extent(extents, extent);
	if (had > count)
		add_extent(extents, page + count, had - count);
	return page;
}

/* These pages, which were taken at once, are free again. */
void kucomms_free_extent(struct kucomms_extents *extents, unsigned long page,
			 unsigned long count)
{
	struct kucomms_extent *entries = extents->entries;
	unsigned long end = page + count;

	if (page && entries[page - 1].pages) {
		page -= entries[page - 1].pages;
		remove_extent(extents, &entries[page]);
	}
	if (end < extents->page_count && entries[end].pages)
		end += remove_extent(extents, &entries[end]);
	add_extent(extents, page, end - page);
}

/* ---- bits ---------------------------------------------------------------- */

/* Is one of these pages used? The time grows with their number. */
bool kucomms_find_used(const struct kucomms_used *used, unsigned long first,
		       unsigned long end)
{
	unsigned long chunks = DIV_ROUND_UP(end, KUCOMMS_CHUNK);

	return find_next_bit(used->chunks, chunks, first / KUCOMMS_CHUNK) <
	       chunks || find_next_bit(used->bits, end, first) < end;
}

static void mark_bits(unsigned long *map, unsigned long first,
		      unsigned long end, bool to)
{
	if (to)
		bitmap_set(map, first, end - first);
	else
		bitmap_clear(map, first, end - first);
}

/* All of these pages are used, or none is: those that were marked at once. */
void kucomms_mark_used(struct kucomms_used *used, unsigned long first,
		       unsigned long end, bool are_used)
{
	unsigned long from = DIV_ROUND_UP(first, KUCOMMS_CHUNK);
	unsigned long to = end / KUCOMMS_CHUNK;

	if (from >= to) {
		mark_bits(used->bits, first, end, are_used);
		return;
	}
	mark_bits(used->bits, first, from * KUCOMMS_CHUNK, are_used);
	mark_bits(used->chunks, from, to, are_used);
	mark_bits(used->bits, to * KUCOMMS_CHUNK, end, are_used);
}
