/* SPDX-License-Identifier: GPL-2.0-only */
/* The module refuses to be built for a machine on which it would corrupt or tear what it shares. */
#ifndef _KUCOMMS_REQUIREMENTS_H
#define _KUCOMMS_REQUIREMENTS_H

#ifndef CONFIG_64BIT
#error "kucomms needs a 64-bit kernel: a position in a ring is one word of 64 bits"
#endif

#ifndef CONFIG_MMU
#error "kucomms needs a kernel with an MMU: it maps its rings into programs"
#endif

/* Kernels before 6.9 do not say whether caches alias; of those with 64 bits, these three do. */
#if defined(CONFIG_ARCH_HAS_CPU_CACHE_ALIASING) || defined(CONFIG_CPU_CACHE_ALIASING) || \
	defined(CONFIG_MIPS) || defined(CONFIG_PARISC) || defined(CONFIG_SPARC)
#error "kucomms needs data caches that do not alias: it has its pages at two addresses each"
#endif

#endif /* _KUCOMMS_REQUIREMENTS_H */
