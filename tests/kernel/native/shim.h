/* SPDX-License-Identifier: GPL-2.0-only */
/* What the kernel's headers for programs lack. */
#include <linux/bitmap.h>

static inline void bitmap_set(unsigned long *map, unsigned long first,
			      unsigned long count)
{
	for (; count; first++, count--)
		map[BIT_WORD(first)] |= BIT_MASK(first);
}
