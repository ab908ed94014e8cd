// SPDX-License-Identifier: GPL-2.0-only
/* relay: a buffer that the kernel writes and the user reads. There is no way back. */

#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/relay.h>

#include "internal.h"

#define SUBBUFFER	(64 * KBENCH_SIZE)
#define SUBBUFFERS	8

static struct dentry *directory;
static struct rchan *channel;

static struct dentry *create_file(const char *name, struct dentry *parent, umode_t mode,
				  struct rchan_buf *buffer, int *is_global)
{
	*is_global = 1;		/* one for all processors, so that there is an order */
	return debugfs_create_file(name, mode, parent, buffer, &relay_file_operations);
}

static int remove_file(struct dentry *file)
{
	debugfs_remove(file);
	return 0;
}

/* Nothing is overwritten: what does not fit is lost. */
static int subbuf_start(struct rchan_buf *buffer, void *subbuf, void *previous,
			size_t padding)
{
	return !relay_buf_full(buffer);
}

static const struct rchan_callbacks callbacks = {
	.create_buf_file = create_file,
	.remove_buf_file = remove_file,
	.subbuf_start = subbuf_start,
};

static int send_burst(u64 first, u32 count)
{
	u64 number;

	for (number = first; number < first + count; number++) {
		kbench_fill(kbench_buffer, number, kbench_run.start.full);
		relay_write(channel, kbench_buffer, KBENCH_SIZE);
	}
	return 0;
}

static int start(const struct kbench_start *start)
{
	if (start->direction == KBENCH_TO_KERNEL)
		return -EOPNOTSUPP;
	relay_reset(channel);
	return 0;
}

static void exit_relay(void)
{
	relay_close(channel);
	debugfs_remove(directory);
}

static int init(void)
{
	directory = debugfs_create_dir("kbench", NULL);
	channel = relay_open("relay", directory, SUBBUFFER, SUBBUFFERS, &callbacks, NULL);
	if (channel)
		return 0;
	debugfs_remove(directory);
	return -ENOMEM;
}

const struct kbench_mechanism kbench_relay = {
	.init = init,
	.exit = exit_relay,
	.start = start,
	.send = send_burst,
};
