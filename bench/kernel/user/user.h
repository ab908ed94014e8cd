/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What the files of the bench program share. */
#ifndef _KBENCH_USER_H
#define _KBENCH_USER_H

#include <stdint.h>

#include "kbench.h"

#define ARRAY_SIZE(array)	(sizeof(array) / sizeof((array)[0]))

/**
 * struct mechanism - the user's side of a mechanism
 * @name: for the command line
 * @number: KBENCH_M_*
 * @open: be ready for the direction; may set @run.start.fd and .port
 * @send: a burst to the kernel, timed as a whole, with all that it takes so
 *	  that the kernel begins to receive it
 * @wait: sleep until the first message of a burst comes
 * @receive: a burst that is there, timed as a whole
 *
 * Functions return 0 or a negative errno.
 */
struct mechanism {
	const char *name;
	uint32_t number;
	int (*open)(void);
	int (*send)(uint64_t first, uint32_t count);
	int (*wait)(uint64_t first);
	int (*receive)(uint64_t first, uint32_t count);
};

/* What this program was asked for. */
struct run {
	struct kbench_start start;
	int control;
	const char *bpf;	/* file with the programs */
};

extern struct run run;
extern uint64_t recovered;	/* times that something was sent again */
extern uint64_t buffer[KBENCH_WORDS];

extern const struct mechanism netlink;
extern const struct mechanism netlink_resync;
extern const struct mechanism genetlink;
extern const struct mechanism chardev;
extern const struct mechanism shared;
extern const struct mechanism relay;
extern const struct mechanism pipes;
extern const struct mechanism bpf;
extern const struct mechanism kucomms;
extern const struct mechanism kucomms_in_place;
extern const struct mechanism kucomms_copied;

/* The time stamp counter, after all before it and before all after it. */
uint64_t cycles(void);

/* Sleep until there is something to read. */
int wait_readable(int fd);

static inline int good(const uint64_t *words, uint64_t number)
{
	return kbench_good((const __u64 *)words, number, (int)run.start.full);
}

static inline void fill(uint64_t *words, uint64_t number)
{
	kbench_fill((__u64 *)words, number, (int)run.start.full);
}

#endif /* _KBENCH_USER_H */
