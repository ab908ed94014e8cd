// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* The counter that the kernel's get_cycles() reads; also for the Python side. */

#include "user.h"

uint64_t cycles(void)
{
#if defined(__x86_64__)
	uint32_t low, high;

	__asm__ __volatile__("lfence; rdtsc; lfence" : "=a" (low), "=d" (high) :: "memory");
	return (uint64_t)high << 32 | low;
#elif defined(__aarch64__)
	uint64_t now;

	__asm__ __volatile__("isb; mrs %0, cntvct_el0; isb" : "=r" (now) :: "memory");
	return now;
#else
#error "which counter does get_cycles() read here?"
#endif
}
