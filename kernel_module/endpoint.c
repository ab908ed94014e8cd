// SPDX-License-Identifier: GPL-2.0-only
/* Endpoints: registering, unregistering, and who gets a new channel. */

#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/slab.h>

#include "internal.h"

LIST_HEAD(kucomms_endpoints);

/* Held while numbered channels are declared, which allocates. */
static DEFINE_MUTEX(kucomms_announce_lock);

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
				     KUCOMMS_RX_IN_PLACE | KUCOMMS_NUMBERED |
				     KUCOMMS_TURNS | KUCOMMS_POOLS) ||
		    (asked->max_pool_bytes && !(asked->flags & KUCOMMS_POOLS)) ||
		    asked->numbered > KUCOMMS_NUMBERED_MAX ||
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
	if (!options->max_channels)
		options->max_channels = KUCOMMS_CHANNELS_DEFAULT;
	if (!options->max_user_channels)
		options->max_user_channels = min_t(u32, options->max_channels,
						   KUCOMMS_USER_CHANNELS_DEFAULT);
	if (!options->max_pool_bytes)
		options->max_pool_bytes = KUCOMMS_POOL_BYTES_DEFAULT;
	options->busy_poll_ns = min_t(u64, options->busy_poll_ns,
				      KUCOMMS_BUSY_POLL_LIMIT);
	if (options->numbered)
		options->flags |= KUCOMMS_NUMBERED;
	return 0;
}

/* ---- numbered channels --------------------------------------------------- */

/*
 * endpoint->numbers has an entry for each number: the channel that has it, or
 * NOBODY with the mark FREE. They are made when channels are declared; so nothing
 * is allocated when one is taken, and the lowest free one is found by the mark.
 */
#define NOBODY	xa_mk_value(0)
#define FREE	XA_MARK_0

/* Make the entries of all numbers up to @count. May sleep, one at a time. */
static int declare(struct kucomms_endpoint *endpoint, u32 count)
{
	u32 number;
	int err;

	for (number = endpoint->numbered; number < count; number++) {
		err = xa_err(xa_store(&endpoint->numbers, number, NOBODY,
				      GFP_KERNEL));
		if (err)
			return err;
		xa_set_mark(&endpoint->numbers, number, FREE);
		cond_resched();
	}
	return 0;
}

/* The endpoint's device has @news for who did not get a channel. */
static void tell_news(struct kucomms_device *device)
{
	/*
	 * After what has changed. pairs with atomic64_read_acquire() in
	 * ask_for_terms()
	 */
	atomic64_inc_return(&device->news);
	wake_up_poll(&device->wait, EPOLLPRI);
}

/* Whether either side has begun to close a channel. */
static bool is_ending(const struct kucomms_channel *channel)
{
	return READ_ONCE(channel->state) &
	       (BIT(KUCOMMS_USER_GONE) | BIT(KUCOMMS_BROKEN) |
		BIT(KUCOMMS_CLOSE_WANTED) | BIT(KUCOMMS_HUNG_UP));
}

/* The channel of this number, with a reference, if it is open; or NULL. */
static struct kucomms_channel *get_numbered(struct kucomms_endpoint *endpoint,
					    u32 number)
{
	struct kucomms_channel *channel;

	/* With its lock: who takes it out puts it after that. */
	xa_lock(&endpoint->numbers);
	channel = xa_load(&endpoint->numbers, number);
	if (channel && !xa_is_value(channel) && !is_ending(channel) &&
	    test_bit(KUCOMMS_OPENED, &channel->state))
		kucomms_channel_get(channel);
	else
		channel = NULL;
	xa_unlock(&endpoint->numbers);
	return channel;
}

/* Whether the channel of this number is just closed. */
static bool number_ends(struct kucomms_endpoint *endpoint, u32 number)
{
	struct kucomms_channel *channel;
	bool ends;

	xa_lock(&endpoint->numbers);
	channel = xa_load(&endpoint->numbers, number);
	/* Between the two steps of kucomms_endpoint_detach() it is nobody's. */
	ends = xa_is_value(channel) || is_ending(channel);
	xa_unlock(&endpoint->numbers);
	return ends;
}

/* ---- the channels of one user -------------------------------------------- */

/* users_lock is held. */
static struct kucomms_user *user_of(struct kucomms_endpoint *endpoint,
				    kuid_t uid)
{
	struct kucomms_user *user;

	hash_for_each_possible(endpoint->users, user, node, __kuid_val(uid))
		if (uid_eq(user->uid, uid))
			return user;
	return NULL;
}

/* Return: 0, -EDQUOT, or -EINPROGRESS when one of the user's is just ending. */
static int admits_user(struct kucomms_endpoint *endpoint, kuid_t uid)
{
	struct kucomms_user *user;
	int err = 0;

	spin_lock(&endpoint->users_lock);
	user = user_of(endpoint, uid);
	if (user && user->channels >= endpoint->options.max_user_channels)
		err = atomic_read(&user->ending) ? -EINPROGRESS : -EDQUOT;
	spin_unlock(&endpoint->users_lock);
	return err;
}

/* The first channel of a user brings the place in which all are counted. */
static void count_user(struct kucomms_endpoint *endpoint,
		       struct kucomms_channel *channel)
{
	struct kucomms_user *user;

	spin_lock(&endpoint->users_lock);
	user = user_of(endpoint, channel->uid);
	if (user) {
		kfree(channel->user);
		channel->user = user;
	} else {
		channel->user->uid = channel->uid;
		hash_add(endpoint->users, &channel->user->node,
			 __kuid_val(channel->uid));
	}
	channel->user->channels++;
	spin_unlock(&endpoint->users_lock);
}

static void uncount_user(struct kucomms_endpoint *endpoint,
			 struct kucomms_channel *channel, bool ending)
{
	struct kucomms_user *user = channel->user;

	channel->user = NULL;
	spin_lock(&endpoint->users_lock);
	if (ending)
		atomic_dec(&user->ending);
	if (--user->channels)
		user = NULL;
	else
		hash_del(&user->node);
	spin_unlock(&endpoint->users_lock);
	kfree(user);
}

/* ---- who gets a channel -------------------------------------------------- */

/**
 * kucomms_endpoint_admits - which number would a new channel get?
 * @endpoint: whose; kucomms_lock is held
 * @wanted: the number that is asked for, or -1
 * @uid: of the user that sets the channel up
 *
 * Return: the number, -ENOENT for a channel without one; -ECHRNG, -EADDRINUSE,
 * -EDQUOT, -EBUSY; -EINPROGRESS instead of these three when a channel is just
 * ending: there will be news.
 */
int kucomms_endpoint_admits(struct kucomms_endpoint *endpoint, s64 wanted,
			    kuid_t uid)
{
	const struct kucomms_endpoint_options *options = &endpoint->options;
	unsigned long number = 0;
	int busy, err;

	/* pairs with atomic_dec_return() in kucomms_endpoint_detach() */
	busy = atomic_read_acquire(&endpoint->device->ending) ? -EINPROGRESS :
								-EBUSY;
	if (wanted >= endpoint->numbered)
		return -ECHRNG;
	if (wanted >= 0)
		wanted = array_index_nospec(wanted, endpoint->numbered);
	if (wanted >= 0 && !xa_get_mark(&endpoint->numbers, wanted, FREE))
		return number_ends(endpoint, wanted) ? -EINPROGRESS :
						       -EADDRINUSE;
	if ((u32)atomic_read(&endpoint->channels) >= options->max_channels)
		return busy;
	err = admits_user(endpoint, uid);
	if (err)
		return err;
	if (wanted >= 0)
		return wanted;
	if (!(options->flags & KUCOMMS_NUMBERED))
		return -ENOENT;
	if (!endpoint->numbered ||
	    !xa_find(&endpoint->numbers, &number, endpoint->numbered - 1, FREE))
		return busy;
	return number;
}

/**
 * kucomms_announce - raise the number of numbered channels
 * @endpoint: an endpoint that numbers its channels
 * @count: how many, at least as many as there were
 *
 * Wakes users that wait for one. May sleep; also from callbacks.
 *
 * Return: 0, -EINVAL when they have no numbers or there would be fewer, -E2BIG
 * for more than KUCOMMS_NUMBERED_MAX, -ENOMEM.
 */
int kucomms_announce(struct kucomms_endpoint *endpoint, u32 count)
{
	int err;

	if (!(endpoint->options.flags & KUCOMMS_NUMBERED))
		return -EINVAL;
	if (count > KUCOMMS_NUMBERED_MAX)
		return -E2BIG;
	mutex_lock(&kucomms_announce_lock);
	err = count < endpoint->numbered ? -EINVAL : declare(endpoint, count);
	if (!err) {
		mutex_lock(&kucomms_lock);
		WRITE_ONCE(endpoint->numbered, count);
		if (endpoint->device)
			tell_news(endpoint->device);
		mutex_unlock(&kucomms_lock);
	}
	mutex_unlock(&kucomms_announce_lock);
	return err;
}
EXPORT_SYMBOL_GPL(kucomms_announce);

/* ---- registering --------------------------------------------------------- */

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
	spin_lock_init(&endpoint->users_lock);
	hash_init(endpoint->users);
	xa_init(&endpoint->numbers);
	err = take_options(endpoint, options);
	if (!err)
		err = declare(endpoint, endpoint->options.numbered);
	if (err)
		goto err_free;
	endpoint->numbered = endpoint->options.numbered;
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
		atomic64_inc(&endpoint->device->news);
		wake_up_all(&endpoint->device->wait);
	}
	mutex_unlock(&kucomms_lock);
	return endpoint;

err_stop:
	if (endpoint->shared)
		kucomms_runner_stop(endpoint->shared);
err_free:
	xa_destroy(&endpoint->numbers);
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
	if (endpoint->device) {
		WRITE_ONCE(endpoint->device->endpoint, NULL);
		tell_news(endpoint->device);
	}
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
	xa_destroy(&endpoint->numbers);
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
 * kucomms_wait_channel - wait until somebody has a channel
 * @endpoint: whose; must not be unregistered meanwhile
 * @number: of the channel
 * @timeout_ns: nanoseconds, 0 to look only, negative for ever
 *
 * Not from a callback, unless @timeout_ns is 0. When the channel has lost its user,
 * the next one is waited for.
 *
 * Return: the channel, to be given to kucomms_channel_put(), or an error pointer:
 * -ECHRNG when there is none of this number, -ETIMEDOUT, -ERESTARTSYS.
 */
struct kucomms_channel *kucomms_wait_channel(struct kucomms_endpoint *endpoint,
					     u32 number, s64 timeout_ns)
{
	struct kucomms_channel *channel;
	long left = 0;

	if (number >= READ_ONCE(endpoint->numbered))
		return ERR_PTR(-ECHRNG);
	channel = get_numbered(endpoint, number);
	if (channel || !timeout_ns)
		goto out;
#define FOUND (channel = get_numbered(endpoint, number))
	if (timeout_ns < 0)
		left = wait_event_interruptible(endpoint->wait, FOUND);
	else
		left = wait_event_interruptible_timeout(endpoint->wait, FOUND,
							nsecs_to_jiffies(timeout_ns) + 1);
#undef FOUND
out:
	return channel ?: ERR_PTR(left < 0 ? left : -ETIMEDOUT);
}
EXPORT_SYMBOL_GPL(kucomms_wait_channel);

/**
 * kucomms_priv - what was given to kucomms_register()
 * @endpoint: the endpoint
 */
void *kucomms_priv(struct kucomms_endpoint *endpoint)
{
	return endpoint->priv;
}
EXPORT_SYMBOL_GPL(kucomms_priv);

/*
 * Give a new channel to its endpoint. kucomms_lock is held, so nothing is
 * allocated here: a user at the limit of his memory would let the others wait.
 * @runner: the channel's own, or NULL
 * @wanted: and the return value: as kucomms_endpoint_admits(), but for 0
 */
int kucomms_endpoint_attach(struct kucomms_endpoint *endpoint,
			    struct kucomms_channel *channel,
			    struct kucomms_runner *runner, s64 wanted)
{
	int number = kucomms_endpoint_admits(endpoint, wanted, channel->uid);

	if (number < 0 && number != -ENOENT)
		return number;
	channel->number = number;
	if (number >= 0) {
		xa_clear_mark(&endpoint->numbers, number, FREE);
		xa_store(&endpoint->numbers, number, channel, 0);
	}
	if (runner) {
		list_add_tail(&runner->list, &endpoint->runners);
		kucomms_runner_start(runner, endpoint);
	}
	count_user(endpoint, channel);
	atomic_inc(&endpoint->channels);
	atomic_inc(&endpoint->device->channels);
	channel->device = endpoint->device;
	channel->endpoint = endpoint;
	channel->serial = ++last_serial;
	kucomms_runner_attach(runner ?: endpoint->shared, channel);
	return 0;
}

/*
 * The opposite: its number is free again, and set-ups that wait for one are told.
 * @ending: it was counted as such
 */
void kucomms_endpoint_detach(struct kucomms_channel *channel, bool ending)
{
	struct kucomms_endpoint *endpoint = channel->endpoint;

	if (channel->number >= 0) {
		xa_store(&endpoint->numbers, channel->number, NOBODY, 0);
		xa_set_mark(&endpoint->numbers, channel->number, FREE);
	}
	uncount_user(endpoint, channel, ending);
	atomic_dec(&endpoint->channels);
	if (ending)
		/*
		 * Who does not find it here finds it gone. pairs with
		 * atomic_read_acquire() in kucomms_endpoint_admits()
		 */
		atomic_dec_return(&channel->device->ending);
	tell_news(channel->device);
	/* The last use of the device: now it may be removed. */
	atomic_dec(&channel->device->channels);
}
