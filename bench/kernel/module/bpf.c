// SPDX-License-Identifier: GPL-2.0-only
/*
 * BPF: a program of the user's, which our thread runs as a tracepoint would. It
 * gets the burst's first number, its count and whether every byte is meant, and
 * returns how many messages it has sent, or received as they were sent.
 */

#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>

#include "internal.h"

static struct bpf_prog *program;

static int run(u64 first, u32 count)
{
	u64 arguments[] = { first, count, kbench_run.start.full };
	u32 done;

	rcu_read_lock();
	migrate_disable();
	done = bpf_prog_run(program, arguments);
	migrate_enable();
	rcu_read_unlock();
	return done == count ? 0 : -EBADMSG;
}

static int start(const struct kbench_start *start)
{
	program = bpf_prog_get_type_dev(start->fd, BPF_PROG_TYPE_RAW_TRACEPOINT, false);
	return PTR_ERR_OR_ZERO(program);
}

static void stop(void)
{
	bpf_prog_put(program);
	program = NULL;
}

const struct kbench_mechanism kbench_bpf = {
	.start = start,
	.stop = stop,
	.send = run,
	.receive = run,
};
