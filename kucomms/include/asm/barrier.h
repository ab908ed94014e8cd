/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The kernel's names for ordered access, in user space.
 *
 * ring.h is written with the names of Documentation/memory-barriers.txt. Here
 * they become the compiler's __atomic builtins, which the thread sanitizer
 * understands.
 */
#ifndef _KUCOMMS_SHIM_ASM_BARRIER_H
#define _KUCOMMS_SHIM_ASM_BARRIER_H

#include <stddef.h>

#ifndef __BYTE_ORDER__
#error "kucomms needs gcc or clang"
#endif
#if __SIZEOF_POINTER__ != 8
#error "kucomms runs on 64-bit machines only"
#endif

#define READ_ONCE(x)		__atomic_load_n(&(x), __ATOMIC_RELAXED)
#define WRITE_ONCE(x, value)	__atomic_store_n(&(x), (value), __ATOMIC_RELAXED)
#define smp_load_acquire(p)	__atomic_load_n((p), __ATOMIC_ACQUIRE)
#define smp_store_release(p, v)	__atomic_store_n((p), (v), __ATOMIC_RELEASE)

#ifdef __SANITIZE_THREAD__
/*
 * gcc refuses a bare fence here; a read-modify-write is as strong. It is made on
 * a variable of the caller's own, or it would order the threads in the eyes of
 * the sanitizer and hide what it is to find.
 */
static inline void smp_mb(void)
{
	int fence = 0;

	__atomic_fetch_add(&fence, 0, __ATOMIC_SEQ_CST);
}
#else
#define smp_mb()		__atomic_thread_fence(__ATOMIC_SEQ_CST)
#endif

#endif
