// SPDX-License-Identifier: GPL-2.0-only
/*
 * The shortest endpoint in the kernel: sends each message back as it is.
 *
 *	modprobe kucomms
 *	echo kucomms_tutorial > /sys/devices/virtual/kucomms/kucomms/create_device
 *	modprobe kucomms_tutorial
 *	kucomms send kernel://tutorial hello
 */
#include <linux/err.h>
#include <linux/module.h>

#include <kucomms/kucomms.h>

static void tutorial_message(struct kucomms_channel *channel,
			     const struct kucomms_message *message)
{
	if (kucomms_send(channel, message) == -EAGAIN)
		kucomms_retry(channel);	/* again when the user has read */
}

static const struct kucomms_endpoint_ops tutorial_ops = {
	.size = sizeof(tutorial_ops),
	.message = tutorial_message,
};

static struct kucomms_endpoint *tutorial;

static int __init tutorial_init(void)
{
	tutorial = kucomms_register("kucomms_tutorial", &tutorial_ops, NULL, NULL);
	return PTR_ERR_OR_ZERO(tutorial);
}

static void __exit tutorial_exit(void)
{
	kucomms_unregister(tutorial);
}

module_init(tutorial_init);
module_exit(tutorial_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms tutorial: echoes each message");
MODULE_VERSION("0.1.0");
