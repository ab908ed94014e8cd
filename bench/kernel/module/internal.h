/* SPDX-License-Identifier: GPL-2.0-only */
/* What the files of the bench module share. */
#ifndef _KBENCH_INTERNAL_H
#define _KBENCH_INTERNAL_H

#include <linux/completion.h>
#include <linux/printk.h>
#include <linux/sched.h>
#include <linux/timex.h>
#include <linux/types.h>
#include <linux/wait.h>

#include "kbench.h"

/**
 * struct kbench_mechanism - the kernel's side of a mechanism
 * @init: at load. Optional
 * @exit: at unload. Optional
 * @start: a run begins. Optional
 * @stop: it is over. Optional
 * @send: a burst to the user, timed as a whole
 * @first: wait for the first message of a burst, take it, check it. Without
 *	   it, the burst is waited for with KBENCH_IOC_KICK
 * @receive: the rest of a burst, which is there; timed as a whole
 * @sleeper: who waits for a burst to the kernel, when that is not our thread
 * @asked: a burst to the user is sent when the user asks for it, by a callback
 *	   that calls kbench_send_asked(), and not by our thread
 * @spins: the receiver polls memory, and needs no wake-up
 * @inside: the kernel's part runs inside the sender's call, and counts with
 *	    kbench_handled()
 */
struct kbench_mechanism {
	int (*init)(void);
	void (*exit)(void);
	int (*start)(const struct kbench_start *start);
	void (*stop)(void);
	int (*send)(u64 first, u32 count);
	int (*first)(u64 number);
	int (*receive)(u64 first, u32 count);
	struct task_struct *(*sleeper)(void);
	bool asked;
	bool spins;
	bool inside;
};

/**
 * struct kbench_run - what goes on
 * @start: how it was begun
 * @mechanism: which
 * @first: number of the first message of the burst
 * @count: its messages
 * @seen: of those, by who is called for each
 * @cycles: what the kernel's part took
 * @timed: messages that @cycles is for
 * @error: what went wrong, or 0
 * @over: the user is gone
 * @kicked: see KBENCH_IOC_KICK
 * @released: the user has sent the whole burst
 * @done: the kernel's part is done
 */
struct kbench_run {
	struct kbench_start start;
	const struct kbench_mechanism *mechanism;
	u64 first;
	u32 count;
	u32 seen;
	u64 cycles;
	u32 timed;
	int error;
	bool over;
	struct completion kicked;
	struct completion released;
	struct completion done;
};

extern struct kbench_run kbench_run;
extern u64 kbench_buffer[KBENCH_WORDS];

extern const struct kbench_mechanism kbench_netlink;
extern const struct kbench_mechanism kbench_netlink_resync;
extern const struct kbench_mechanism kbench_genetlink;
extern const struct kbench_mechanism kbench_chardev;
extern const struct kbench_mechanism kbench_mmap;
extern const struct kbench_mechanism kbench_relay;
extern const struct kbench_mechanism kbench_pipe;
extern const struct kbench_mechanism kbench_bpf;
extern const struct kbench_mechanism kbench_kucomms;
extern const struct kbench_mechanism kbench_kucomms_in_place;
extern const struct kbench_mechanism kbench_kucomms_copied;

int kbench_cpu(void);
void kbench_send_asked(void);

/* On x86 this is lfence, rdtsc. */
static inline u64 kbench_cycles(void)
{
	rmb();	/* not read before what was loaded before it */
	return get_cycles();
}

static inline bool kbench_check(const u64 *words, u64 number)
{
	if (likely(kbench_good(words, number, kbench_run.start.full)))
		return true;
	pr_notice_ratelimited("kbench: message %llu is not as it was sent\n", number);
	return false;
}

/* A message was received inside the sender's call. */
static inline void kbench_handled(u64 cycles, int err)
{
	kbench_run.cycles += cycles;
	kbench_run.timed++;
	if (err)
		kbench_run.error = err;
}

#endif /* _KBENCH_INTERNAL_H */
