// SPDX-License-Identifier: GPL-2.0-only
/*
 * Counters, in /sys/kernel/debug/kucomms: alive, what of each kind there is now,
 * and for each channel a file DEVICE.NUMBER.
 */

#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>
#include <linux/user_namespace.h>

#include "internal.h"

static struct dentry *root;

static int alive_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "devices %d\n", atomic_read(&kucomms_alive.devices));
	seq_printf(file, "endpoints %d\n",
		   atomic_read(&kucomms_alive.endpoints));
	seq_printf(file, "runners %d\n", atomic_read(&kucomms_alive.runners));
	seq_printf(file, "channels %d\n",
		   atomic_read(&kucomms_alive.channels));
	seq_printf(file, "pages %ld\n",
		   atomic_long_read(&kucomms_alive.pages));
	seq_printf(file, "protocol_errors %lld\n",
		   atomic64_read(&kucomms_alive.protocol_errors));
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(alive);

static u64 count_of(const u64 *count)
{
	/* Who counts takes no care of us, and one too few does no harm here. */
	return data_race(*count);
}

static int channel_show(struct seq_file *file, void *unused)
{
	struct kucomms_channel *channel = file->private;
	unsigned int pools;
	u64 pool_pages;

	seq_printf(file, "pid %d\n", channel->pid);
	seq_printf(file, "uid %u\n",
		   from_kuid_munged(&init_user_ns, channel->uid));
	if (channel->number >= 0)
		seq_printf(file, "number %d\n", channel->number);
	seq_printf(file, "ring_size %llu\n", channel->ring_size);
	seq_printf(file, "has_turn %d\n", kucomms_has_turn(channel));
	seq_printf(file, "messages_sent %llu\n",
		   count_of(&channel->messages_sent));
	seq_printf(file, "bytes_sent %llu\n", count_of(&channel->bytes_sent));
	seq_printf(file, "messages_received %llu\n",
		   count_of(&channel->messages_received));
	seq_printf(file, "bytes_received %llu\n",
		   count_of(&channel->bytes_received));
	seq_printf(file, "full %llu\n", count_of(&channel->full));
	seq_printf(file, "doorbells_rung %lld\n",
		   atomic64_read(&channel->doorbells_rung));
	seq_printf(file, "doorbells_heard %lld\n",
		   atomic64_read(&channel->doorbells_heard));
	seq_printf(file, "ticks_missed %llu\n",
		   count_of(&channel->ticks_missed));
	seq_printf(file, "polls_hit %llu\n", count_of(&channel->polls_hit));
	seq_printf(file, "polls_missed %llu\n",
		   count_of(&channel->polls_missed));
	seq_printf(file, "poll_ns %llu\n", count_of(&channel->poll_ns));
	seq_printf(file, "tx_high_water %llu\n",
		   count_of(&channel->tx.high_water));
	seq_printf(file, "rx_high_water %llu\n",
		   count_of(&channel->rx.high_water));
	kucomms_pools_count(channel, &pools, &pool_pages);
	seq_printf(file, "pools %u\n", pools);
	seq_printf(file, "pool_pages %llu\n", pool_pages);
	if (channel->pools) {
		seq_printf(file, "buffers_sent %llu\n",
			   count_of(&channel->pools->sent));
		seq_printf(file, "buffers_received %llu\n",
			   count_of(&channel->pools->received));
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(channel);

struct addition {
	struct work_struct work;
	struct kucomms_channel *channel;
	const char *name;
};

static void add_channel(struct work_struct *work)
{
	struct addition *addition = container_of(work, struct addition, work);
	struct kucomms_channel *channel = addition->channel;
	char file[KUCOMMS_DEVICE_NAME_MAX + 24];

	snprintf(file, sizeof(file), "%s.%llu", addition->name,
		 channel->serial);
	channel->debugfs = debugfs_create_file(file, 0400, root, channel,
					       &channel_fops);
}

/*
 * In a thread of ours, which no user pays for: it allocates under the lock of the
 * directory, and who is at his limit would let the others wait for that.
 */
void kucomms_debugfs_add(struct kucomms_channel *channel, const char *name)
{
	struct addition addition = { .channel = channel, .name = name };

	INIT_WORK_ONSTACK(&addition.work, add_channel);
	queue_work(kucomms_workqueue, &addition.work);
	flush_work(&addition.work);
	destroy_work_on_stack(&addition.work);
}

/* Waits for who reads it. */
void kucomms_debugfs_remove(struct kucomms_channel *channel)
{
	debugfs_remove(channel->debugfs);
}

void kucomms_debugfs_init(void)
{
	root = debugfs_create_dir("kucomms", NULL);
	debugfs_create_file("alive", 0400, root, NULL, &alive_fops);
}

void kucomms_debugfs_exit(void)
{
	debugfs_remove_recursive(root);
}
