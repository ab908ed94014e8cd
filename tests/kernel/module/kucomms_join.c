// SPDX-License-Identifier: GPL-2.0-only
/*
 * Joins pairs of channels, so that both ends of a link can be in user space
 * while every byte goes through the kernel.
 *
 * A channel whose hello begins with "listen" waits to be joined. Any other is
 * joined to the one that has waited longest at the same endpoint, or refused
 * with -ENOTCONN. The one that waited then gets a message with all bits set in
 * its type, and the other's hello as its data. From then on each message goes
 * to the other channel as it is.
 *
 * When there is no room, the message stays where it is until there is.
 * When one of a pair is closed, the other is, as soon as it has got everything.
 *
 * Endpoints are those of the parameter "names", and what is written to
 * "register" and "unregister".
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/err.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/string.h>

#include <kucomms/kucomms.h>

#define JOIN_LISTEN	"listen"
#define JOIN_TYPE	(~0ULL)

/**
 * struct join_endpoint - an endpoint, and who waits there
 * @list: in join_endpoints
 * @endpoint: of the kernel module
 * @waiting: channels that wait to be joined; for the callbacks only
 * @name: of the device
 */
struct join_endpoint {
	struct list_head list;
	struct kucomms_endpoint *endpoint;
	struct list_head waiting;
	char name[];
};

/**
 * struct join_channel - one of a pair
 * @list: in the endpoint's waiting
 * @channel: whose this is
 * @other: of the pair; NULL as long as there is none, and when it is closed
 * @waits: a message of this channel has found no room in the other
 * @stuck: it was tried again in vain, and nothing was taken out of this channel's
 *	   ring in between
 */
struct join_channel {
	struct list_head list;
	struct kucomms_channel *channel;
	struct join_channel *other;
	bool waits;
	bool stuck;
};

static LIST_HEAD(join_endpoints);
static DEFINE_MUTEX(join_lock);		/* of join_endpoints and join_ready */
static bool join_ready;

static atomic_t join_stuck = ATOMIC_INIT(0);

static void join_set_stuck(struct join_channel *from, bool stuck)
{
	if (from->stuck != stuck)
		atomic_add(stuck ? 1 : -1, &join_stuck);
	from->stuck = stuck;
}

static void join_message(struct kucomms_channel *channel,
			 const struct kucomms_message *message)
{
	struct join_channel *from = kucomms_channel_priv(channel);
	int err = from->other ? kucomms_send(from->other->channel, message) : 0;

	if (err == -EAGAIN) {
		join_set_stuck(from, from->waits);
		from->waits = true;
		kucomms_retry(channel);
		return;
	}
	from->waits = false;
	join_set_stuck(from, false);
	if (err && err != -ESHUTDOWN) {	/* after that its close callback follows */
		pr_warn_ratelimited("%u bytes cannot be forwarded: %pe\n",
				    message->length, ERR_PTR(err));
		kucomms_close(from->other->channel);
	}
}

/* There may be room here for what the other one has. */
static void join_writable(struct kucomms_channel *channel)
{
	struct join_channel *self = kucomms_channel_priv(channel);

	if (self->other && self->other->waits)
		kucomms_resume(self->other->channel);
}

/* Once more in vain, and nothing has come in between: then it is stuck. */
static bool join_work(struct kucomms_channel *channel)
{
	struct join_channel *self = kucomms_channel_priv(channel);

	if (self->waits && !self->stuck)
		kucomms_resume(channel);
	return false;
}

static int join_open(struct kucomms_channel *channel, const struct kucomms_peer *peer)
{
	struct join_endpoint *endpoint = kucomms_priv(kucomms_channel_endpoint(channel));
	bool listens = peer->hello_length >= strlen(JOIN_LISTEN) &&
		       !memcmp(peer->hello, JOIN_LISTEN, strlen(JOIN_LISTEN));
	struct join_channel *self, *other;
	struct kucomms_message first = {
		.type = JOIN_TYPE,
		.length = peer->hello_length,
		.data = (void *)peer->hello,
	};

	other = list_first_entry_or_null(&endpoint->waiting, struct join_channel, list);
	if (!listens && !other)
		return -ENOTCONN;
	self = kzalloc(sizeof(*self), GFP_KERNEL);
	if (!self)
		return -ENOMEM;
	INIT_LIST_HEAD(&self->list);
	self->channel = channel;
	kucomms_channel_set_priv(channel, self);
	if (listens) {
		list_add_tail(&self->list, &endpoint->waiting);
		return 0;
	}
	list_del_init(&other->list);
	self->other = other;
	other->other = self;
	return kucomms_send(other->channel, &first);	/* into an empty ring */
}

/* What it had to say has been forwarded. */
static void join_close(struct kucomms_channel *channel)
{
	struct join_channel *self = kucomms_channel_priv(channel);

	list_del(&self->list);
	if (self->other) {
		self->other->other = NULL;
		kucomms_close(self->other->channel);
	}
	join_set_stuck(self, false);
	kfree(self);
}

static const struct kucomms_endpoint_ops join_ops = {
	.size = sizeof(join_ops),
	.message = join_message,
	.work = join_work,
	.writable = join_writable,
	.open = join_open,
	.close = join_close,
};

/* ---- endpoints ---------------------------------------------------------- */

static struct join_endpoint *join_find(const char *name, size_t length)
{
	struct join_endpoint *endpoint;

	list_for_each_entry(endpoint, &join_endpoints, list)
		if (strlen(endpoint->name) == length && !memcmp(endpoint->name, name, length))
			return endpoint;
	return NULL;
}

static unsigned int flags;
module_param(flags, uint, 0600);
MODULE_PARM_DESC(flags, "of endpoints that are registered from now on");

static unsigned int max_channels;
module_param(max_channels, uint, 0600);
MODULE_PARM_DESC(max_channels, "of endpoints that are registered from now on");

static unsigned int numbered;
module_param(numbered, uint, 0600);
MODULE_PARM_DESC(numbered, "of endpoints that are registered from now on");

static int join_register(const char *name, size_t length)
{
	const struct kucomms_endpoint_options options = {
		.size = sizeof(options),
		.flags = flags,
		.max_channels = max_channels,
		.numbered = numbered,
	};
	struct join_endpoint *endpoint;

	endpoint = kzalloc(struct_size(endpoint, name, length + 1), GFP_KERNEL);
	if (!endpoint)
		return -ENOMEM;
	INIT_LIST_HEAD(&endpoint->waiting);
	memcpy(endpoint->name, name, length);
	endpoint->endpoint = kucomms_register(endpoint->name, &join_ops, &options, endpoint);
	if (IS_ERR(endpoint->endpoint)) {
		int err = PTR_ERR(endpoint->endpoint);

		kfree(endpoint);
		return err;
	}
	list_add(&endpoint->list, &join_endpoints);
	return 0;
}

static void join_unregister(struct join_endpoint *endpoint)
{
	list_del(&endpoint->list);
	kucomms_unregister(endpoint->endpoint);
	kfree(endpoint);
}

static void join_unregister_all(void)
{
	struct join_endpoint *endpoint, *next;

	list_for_each_entry_safe(endpoint, next, &join_endpoints, list)
		join_unregister(endpoint);
}

static int join_set_register(const char *value, const struct kernel_param *param)
{
	int err = -EAGAIN;

	mutex_lock(&join_lock);
	if (join_ready)
		err = join_register(value, strcspn(value, "\n"));
	mutex_unlock(&join_lock);
	return err;
}

static int join_set_unregister(const char *value, const struct kernel_param *param)
{
	struct join_endpoint *endpoint;
	int err = -ENOENT;

	mutex_lock(&join_lock);
	endpoint = join_find(value, strcspn(value, "\n"));
	if (endpoint) {
		join_unregister(endpoint);
		err = 0;
	}
	mutex_unlock(&join_lock);
	return err;
}

static int join_get_stuck(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d\n", atomic_read(&join_stuck));
}

static const struct kernel_param_ops join_register_ops = { .set = join_set_register };
static const struct kernel_param_ops join_unregister_ops = { .set = join_set_unregister };
static const struct kernel_param_ops join_stuck_ops = { .get = join_get_stuck };

module_param_cb(register, &join_register_ops, NULL, 0200);
MODULE_PARM_DESC(register, "write a name here to register an endpoint");
module_param_cb(unregister, &join_unregister_ops, NULL, 0200);
MODULE_PARM_DESC(unregister, "write a name here to unregister its endpoint");
module_param_cb(stuck, &join_stuck_ops, NULL, 0400);
MODULE_PARM_DESC(stuck, "how many channels have had no room for a while");

static char *names = "kucomms_join";
module_param(names, charp, 0400);
MODULE_PARM_DESC(names, "names of the first endpoints, with commas in between");

static int __init join_init(void)
{
	const char *name = names;
	int err = 0;

	mutex_lock(&join_lock);
	while (*name && !err) {
		size_t length = strcspn(name, ",");

		err = join_register(name, length);
		name += length;
		if (*name)
			name++;
	}
	if (err)
		join_unregister_all();
	else
		join_ready = true;
	mutex_unlock(&join_lock);
	return err;
}

static void __exit join_exit(void)
{
	mutex_lock(&join_lock);
	join_ready = false;
	join_unregister_all();
	mutex_unlock(&join_lock);
}

module_init(join_init);
module_exit(join_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: joins two channels to each other");
MODULE_VERSION("0.1.0");
