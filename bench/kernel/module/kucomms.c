// SPDX-License-Identifier: GPL-2.0-only
/*
 * kucomms in three ways. The user's messages are copied out of the ring before
 * they are looked at, or looked at in place; ours are copied into it, or written
 * in place, by any thread or by the endpoint's own as the only sender.
 */

#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/module.h>
#include <kucomms/kucomms.h>

#include "internal.h"

static struct kucomms_endpoint *by_default, *in_place;
static struct kucomms_channel *channel;
static struct task_struct *thread;	/* that calls our callbacks */
static u64 begin;

/*
 * The first message of a burst waits for the rest to be sent, and what is timed
 * goes from here, once to the same place for each further message.
 */
static void message(struct kucomms_channel *from, const struct kucomms_message *message)
{
	/* pairs with smp_store_release() in arm() */
	u32 seen = smp_load_acquire(&kbench_run.seen);
	u64 now;

	if (kbench_run.start.direction == KBENCH_TO_USER) {
		kbench_send_asked();
		return;
	}
	if (!seen) {
		wait_for_completion(&kbench_run.released);
		begin = kbench_cycles();
	}
	if (++seen == kbench_run.count) {
		now = kbench_cycles();
		kbench_run.cycles = now - begin;
		kbench_run.timed = kbench_run.count - 1;
	}
	if (message->length != KBENCH_SIZE ||
	    !kbench_check(message->data, kbench_run.first + seen - 1))
		kbench_run.error = -EBADMSG;
	kbench_run.seen = seen;
	if (seen == kbench_run.count)
		complete(&kbench_run.done);
}

static int send_copies(u64 first, u32 count)
{
	struct kucomms_message message = {
		.length = KBENCH_SIZE,
		.data = kbench_buffer,
	};
	u64 number;
	int err;

	if (!channel)
		return -ENOTCONN;
	for (number = first; number < first + count; number++) {
		kbench_fill(kbench_buffer, number, kbench_run.start.full);
		err = kucomms_send(channel, &message);
		if (err)
			return err;
	}
	return 0;
}

/* Our thread is not the endpoint's. */
static int send_reserved(u64 first, u32 count)
{
	struct kucomms_message *message;
	u64 number;

	if (!channel)
		return -ENOTCONN;
	for (number = first; number < first + count; number++) {
		message = kucomms_reserve(channel, KBENCH_SIZE);
		if (IS_ERR(message))
			return PTR_ERR(message);
		kbench_fill(message->data, number, kbench_run.start.full);
		kucomms_commit(channel, message);
	}
	return 0;
}

/* In the callback, with nobody else who sends. */
static int send_unlocked(u64 first, u32 count)
{
	struct kucomms_message *message;
	u64 number;

	if (!channel)
		return -ENOTCONN;
	for (number = first; number < first + count; number++) {
		message = kucomms_reserve_unlocked(channel, KBENCH_SIZE);
		if (IS_ERR(message))
			return PTR_ERR(message);
		kbench_fill(message->data, number, kbench_run.start.full);
		kucomms_commit_unlocked(channel, message);
	}
	return 0;
}

static int open(struct kucomms_channel *opened, const struct kucomms_peer *peer)
{
	if (channel)
		return -EBUSY;
	set_cpus_allowed_ptr(current, cpumask_of(kbench_cpu()));
	thread = current;
	channel = kucomms_channel_get(opened);
	return 0;
}

static void close(struct kucomms_channel *closed)
{
	channel = NULL;
	kucomms_channel_put(closed);
}

static struct task_struct *sleeper(void)
{
	return channel ? thread : NULL;
}

static const struct kucomms_endpoint_ops ops = {
	.size = sizeof(ops),
	.message = message,
	.open = open,
	.close = close,
};

static int init_by_default(void)
{
	by_default = kucomms_register(KBENCH_ENDPOINT, &ops, NULL, NULL);
	return PTR_ERR_OR_ZERO(by_default);
}

static int init_in_place(void)
{
	static const struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = KUCOMMS_RX_IN_PLACE,
	};

	in_place = kucomms_register(KBENCH_IN_PLACE, &ops, &options, NULL);
	return PTR_ERR_OR_ZERO(in_place);
}

static void exit_by_default(void)
{
	kucomms_unregister(by_default);
}

static void exit_in_place(void)
{
	kucomms_unregister(in_place);
}

const struct kbench_mechanism kbench_kucomms = {
	.init = init_by_default,
	.exit = exit_by_default,
	.send = send_reserved,
	.sleeper = sleeper,
};

const struct kbench_mechanism kbench_kucomms_in_place = {
	.init = init_in_place,
	.exit = exit_in_place,
	.send = send_unlocked,
	.sleeper = sleeper,
	.asked = true,
};

/* At the endpoint of kbench_kucomms. */
const struct kbench_mechanism kbench_kucomms_copied = {
	.send = send_copies,
	.sleeper = sleeper,
};
