// SPDX-License-Identifier: GPL-2.0-only
/* Endpoints: registering, unregistering, and who gets a new channel. */

#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "internal.h"

LIST_HEAD(kucomms_endpoints);

static u64 last_serial;		/* kucomms_lock */

static struct kucomms_endpoint *find_endpoint(const char *name)
{
	struct kucomms_endpoint *endpoint;

	list_for_each_entry(endpoint, &kucomms_endpoints, list)
		if (!strcmp(endpoint->name, name))
			return endpoint;
	return NULL;
}

static u64 ring_size_or(u64 asked, u64 otherwise)
{
	return roundup_pow_of_two(clamp_t(u64, asked ?: otherwise, PAGE_SIZE,
					  KUCOMMS_RING_MAX));
}

/* A newer module's structure will do if what we do not know in it is zero. */
static bool size_fits(const void *data, size_t size, size_t known)
{
	return size >= known && size <= PAGE_SIZE &&
	       !memchr_inv(data + known, 0, size - known);
}

static int take_options(struct kucomms_endpoint *endpoint,
			const struct kucomms_endpoint_options *asked)
{
	struct kucomms_endpoint_options *options = &endpoint->options;

	if (asked) {
		if (!size_fits(asked, asked->size, sizeof(*asked)) ||
		    asked->flags & ~(KUCOMMS_THREAD_PER_CHANNEL |
				     KUCOMMS_RX_IN_PLACE) ||
		    asked->hello_length > KUCOMMS_HELLO_MAX ||
		    (asked->hello_length && !asked->hello))
			return -EINVAL;
		*options = *asked;
		memcpy(endpoint->hello, asked->hello, asked->hello_length);
	}
	options->hello = endpoint->hello;
	options->ring_size = ring_size_or(options->ring_size,
					  KUCOMMS_RING_DEFAULT);
	options->max_ring_size =
		max(ring_size_or(options->max_ring_size, KUCOMMS_RING_LIMIT),
		    options->ring_size);
	options->busy_poll_ns = min_t(u64, options->busy_poll_ns,
				      KUCOMMS_BUSY_POLL_LIMIT);
	return 0;
}

/**
 * kucomms_register - become the endpoint of a device
 * @name: of the device, "kucomms_" and what follows; it may be created later
 * @ops: the callbacks, which may come as soon as this is called
 * @options: NULL for the defaults
 * @priv: the module's, see kucomms_priv()
 *
 * May sleep. Return: the endpoint, or an error pointer: -EINVAL for a bad
 * argument, -ENAMETOOLONG, -EEXIST when there is an endpoint of this name,
 * -ENOMEM.
 */
struct kucomms_endpoint *
kucomms_register(const char *name, const struct kucomms_endpoint_ops *ops,
		 const struct kucomms_endpoint_options *options, void *priv)
{
	struct kucomms_endpoint *endpoint;
	struct kucomms_runner *runner;
	int err;

	err = kucomms_check_name(name, strlen(name));
	if (err)
		return ERR_PTR(err);
	if (!ops || !size_fits(ops, ops->size, sizeof(*ops)) || !ops->message)
		return ERR_PTR(-EINVAL);
	endpoint = kzalloc(sizeof(*endpoint), GFP_KERNEL);
	if (!endpoint)
		return ERR_PTR(-ENOMEM);
	strscpy(endpoint->name, name, sizeof(endpoint->name));
	endpoint->ops = ops;
	endpoint->priv = priv;
	INIT_LIST_HEAD(&endpoint->runners);
	init_waitqueue_head(&endpoint->wait);
	err = take_options(endpoint, options);
	if (err)
		goto err_free;
	if (!(endpoint->options.flags & KUCOMMS_THREAD_PER_CHANNEL)) {
		runner = kucomms_runner_new(name);
		if (IS_ERR(runner)) {
			err = PTR_ERR(runner);
			goto err_free;
		}
		endpoint->shared = runner;
		kucomms_runner_start(runner, endpoint);
		/* Stopped before it has begun, it would shut nothing down. */
		wait_for_completion(&runner->started);
	}

	mutex_lock(&kucomms_lock);
	if (find_endpoint(name)) {
		mutex_unlock(&kucomms_lock);
		err = -EEXIST;
		goto err_stop;
	}
	list_add_tail(&endpoint->list, &kucomms_endpoints);
	endpoint->serial = ++last_serial;
	atomic_inc(&kucomms_alive.endpoints);
	endpoint->device = kucomms_find_device(name);
	if (endpoint->device) {
		WRITE_ONCE(endpoint->device->endpoint, endpoint);
		wake_up_all(&endpoint->device->wait);
	}
	mutex_unlock(&kucomms_lock);
	return endpoint;

err_stop:
	if (endpoint->shared)
		kucomms_runner_stop(endpoint->shared);
err_free:
	kfree(endpoint);
	return ERR_PTR(err);
}
EXPORT_SYMBOL_GPL(kucomms_register);

/**
 * kucomms_unregister - the opposite of kucomms_register()
 * @endpoint: from there; gone after this
 *
 * Who is connected sees ShutdownError: when it sends at once, when it receives
 * after what was sent before. May sleep, as long as a callback does.
 *
 * Return: 0 when no callback runs any more, -EDEADLK from a callback.
 */
int kucomms_unregister(struct kucomms_endpoint *endpoint)
{
	struct kucomms_runner *runner;

	if (kucomms_runner_is_current(endpoint))
		return -EDEADLK;

	mutex_lock(&kucomms_lock);
	list_del(&endpoint->list);
	if (endpoint->device)
		WRITE_ONCE(endpoint->device->endpoint, NULL);
	endpoint->device = NULL;
	/* From here on nobody finds it, so no channel comes any more. */
	list_for_each_entry(runner, &endpoint->runners, list) {
		WRITE_ONCE(runner->shut, true);
		wake_up_process(runner->task);
	}
	mutex_unlock(&kucomms_lock);

	if (endpoint->shared)
		kucomms_runner_stop(endpoint->shared);
	wait_event(endpoint->wait, list_empty_careful(&endpoint->runners));
	/* Who woke us still has the lock: let it finish. */
	mutex_lock(&kucomms_lock);
	mutex_unlock(&kucomms_lock);
	kfree(endpoint);
	atomic_dec(&kucomms_alive.endpoints);
	return 0;
}
EXPORT_SYMBOL_GPL(kucomms_unregister);

/**
 * kucomms_wait_open - wait until somebody is connected
 * @endpoint: the endpoint; must not be unregistered meanwhile
 * @timeout_ns: nanoseconds, negative for ever
 *
 * Not from a callback. Return: 0, -ETIMEDOUT, -ERESTARTSYS.
 */
int kucomms_wait_open(struct kucomms_endpoint *endpoint, s64 timeout_ns)
{
	long left;

	if (timeout_ns < 0)
		return wait_event_interruptible(endpoint->wait,
						atomic_read(&endpoint->opened));
	left = wait_event_interruptible_timeout(endpoint->wait,
						atomic_read(&endpoint->opened),
						nsecs_to_jiffies(timeout_ns) + 1);
	return left < 0 ? left : left ? 0 : -ETIMEDOUT;
}
EXPORT_SYMBOL_GPL(kucomms_wait_open);

/**
 * kucomms_priv - what was given to kucomms_register()
 * @endpoint: the endpoint
 */
void *kucomms_priv(struct kucomms_endpoint *endpoint)
{
	return endpoint->priv;
}
EXPORT_SYMBOL_GPL(kucomms_priv);

/* Does it take no more channels? kucomms_lock is held. */
bool kucomms_endpoint_full(struct kucomms_endpoint *endpoint)
{
	u32 most = endpoint->options.max_channels;

	return most && atomic_read(&endpoint->channels) >= most;
}

/*
 * Give a new channel to its endpoint. kucomms_lock is held, so nothing is
 * allocated here: a user at the limit of his memory would let the others wait.
 * @runner: the channel's own, or NULL
 */
int kucomms_endpoint_attach(struct kucomms_endpoint *endpoint,
			    struct kucomms_channel *channel,
			    struct kucomms_runner *runner)
{
	if (kucomms_endpoint_full(endpoint))
		return -EBUSY;
	if (runner) {
		list_add_tail(&runner->list, &endpoint->runners);
		kucomms_runner_start(runner, endpoint);
	}
	atomic_inc(&endpoint->channels);
	atomic_inc(&endpoint->device->channels);
	channel->device = endpoint->device;
	channel->endpoint = endpoint;
	channel->serial = ++last_serial;
	kucomms_runner_attach(runner ?: endpoint->shared, channel);
	return 0;
}
