// SPDX-License-Identifier: GPL-2.0-only
/*
 * Endpoints whose limits are parameters, and whose callbacks can be slow; the other
 * half is tests/kernel/test_limits.py. Messages are echoed.
 *
 *	kucomms_limits		one thread
 *	kucomms_limits_threads	the same limits, a thread for each channel
 *
 * By the hello of a channel:
 *
 *	block	the open callback waits for the gate
 *	refuse	so it does, then says no
 *	late	the close callback waits for the gate
 */
#include <linux/err.h>
#include <linux/errno.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/string.h>
#include <linux/uidgid.h>
#include <linux/user_namespace.h>
#include <linux/wait.h>

#include <kucomms/kucomms.h>

static unsigned int flags;
module_param(flags, uint, 0400);
MODULE_PARM_DESC(flags, "of both endpoints");

static unsigned int max_channels;
module_param(max_channels, uint, 0400);
MODULE_PARM_DESC(max_channels, "of each endpoint");

static unsigned int max_user_channels;
module_param(max_user_channels, uint, 0400);
MODULE_PARM_DESC(max_user_channels, "of each endpoint");

static unsigned long long max_pool_bytes;
module_param(max_pool_bytes, ullong, 0400);
MODULE_PARM_DESC(max_pool_bytes, "of each channel");

static unsigned int opens;
module_param(opens, uint, 0400);
MODULE_PARM_DESC(opens, "open callbacks that have begun");

static unsigned int closes;
module_param(closes, uint, 0400);
MODULE_PARM_DESC(closes, "close callbacks that have begun");

static int peer_pid;
module_param(peer_pid, int, 0400);
MODULE_PARM_DESC(peer_pid, "what the last open callback was told");

static unsigned int peer_uid;
module_param(peer_uid, uint, 0400);
MODULE_PARM_DESC(peer_uid, "what the last open callback was told");

static DECLARE_WAIT_QUEUE_HEAD(limits_wait);
static bool limits_gate;

static int limits_set_gate(const char *value, const struct kernel_param *param)
{
	int err = param_set_bool(value, param);

	wake_up_all(&limits_wait);
	return err;
}

static const struct kernel_param_ops limits_gate_ops = {
	.set = limits_set_gate,
	.get = param_get_bool,
};

module_param_cb(gate, &limits_gate_ops, &limits_gate, 0600);
MODULE_PARM_DESC(gate, "whether slow callbacks go on");

static void limits_pass_gate(void)
{
	wait_event_idle(limits_wait, READ_ONCE(limits_gate));
}

static bool limits_says(const struct kucomms_peer *peer, const char *word)
{
	return peer->hello_length == strlen(word) &&
	       !memcmp(peer->hello, word, strlen(word));
}

static int limits_open(struct kucomms_channel *channel, const struct kucomms_peer *peer)
{
	peer_pid = peer->pid;
	peer_uid = from_kuid_munged(&init_user_ns, peer->uid);
	WRITE_ONCE(opens, opens + 1);
	if (limits_says(peer, "late"))
		kucomms_channel_set_priv(channel, channel);
	if (limits_says(peer, "block") || limits_says(peer, "refuse"))
		limits_pass_gate();
	return limits_says(peer, "refuse") ? -EACCES : 0;
}

static void limits_close(struct kucomms_channel *channel)
{
	WRITE_ONCE(closes, closes + 1);
	if (kucomms_channel_priv(channel))
		limits_pass_gate();
}

static void limits_message(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	if (kucomms_send(channel, message) == -EAGAIN)
		kucomms_retry(channel);
}

static const struct kucomms_endpoint_ops limits_ops = {
	.size = sizeof(limits_ops),
	.message = limits_message,
	.open = limits_open,
	.close = limits_close,
};

static struct kucomms_endpoint *limits_shared, *limits_threads;

static int __init limits_init(void)
{
	struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = flags,
		.max_channels = max_channels,
		.max_user_channels = max_user_channels,
		.max_pool_bytes = max_pool_bytes,
	};

	limits_shared = kucomms_register("kucomms_limits", &limits_ops, &options, NULL);
	if (IS_ERR(limits_shared))
		return PTR_ERR(limits_shared);
	options.flags |= KUCOMMS_THREAD_PER_CHANNEL;
	limits_threads = kucomms_register("kucomms_limits_threads", &limits_ops, &options, NULL);
	if (!IS_ERR(limits_threads))
		return 0;
	kucomms_unregister(limits_shared);
	return PTR_ERR(limits_threads);
}

static void __exit limits_exit(void)
{
	WRITE_ONCE(limits_gate, true);
	wake_up_all(&limits_wait);
	kucomms_unregister(limits_threads);
	kucomms_unregister(limits_shared);
}

module_init(limits_init);
module_exit(limits_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: limits, and callbacks that are slow");
MODULE_VERSION("0.1.0");
