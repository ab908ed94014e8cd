// SPDX-License-Identifier: GPL-2.0-only
/* The open file of /dev/kucomms_NAME. */

#include <linux/compat.h>
#include <linux/cred.h>
#include <linux/fs.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "internal.h"

/**
 * struct kucomms_file - an open file
 * @device: which device
 * @pid: of the process that has opened it
 * @lock: for setting up
 * @pending_lock: of @pending
 * @pending: a channel for which the endpoint's answer is waited for
 * @answer: what its user gets if that is yes
 * @channel: once it is set up; does not change after that
 * @seen: the device's news when there was no channel to be had; 0 before that
 */
struct kucomms_file {
	struct kucomms_device *device;
	pid_t pid;
	struct mutex lock;	/* of setting up */
	spinlock_t pending_lock;	/* of @pending */
	struct kucomms_channel *pending;
	struct kucomms_setup answer;
	struct kucomms_channel *channel;
	u64 seen;
};

static struct kucomms_channel *channel_of(struct file *file)
{
	struct kucomms_file *kfile = file->private_data;

	/* pairs with smp_store_release() in take_answer() */
	return smp_load_acquire(&kfile->channel);
}

static int device_open(struct inode *inode, struct file *file)
{
	struct kucomms_device *device;
	struct kucomms_file *kfile;

	kfile = kzalloc(sizeof(*kfile), GFP_KERNEL_ACCOUNT);
	if (!kfile)
		return -ENOMEM;
	mutex_init(&kfile->lock);
	spin_lock_init(&kfile->pending_lock);
	kfile->pid = task_tgid_nr(current);
	mutex_lock(&kucomms_lock);
	device = kucomms_device_by_minor(iminor(inode));
	if (device)
		device->opens++;
	mutex_unlock(&kucomms_lock);
	if (!device) {
		kfree(kfile);
		return -ENXIO;
	}
	kfile->device = device;
	file->private_data = kfile;
	return nonseekable_open(inode, file);
}

static void give_up(struct kucomms_channel *channel)
{
	kucomms_channel_user_gone(channel);
	kucomms_channel_put(channel);
}

static int device_release(struct inode *inode, struct file *file)
{
	struct kucomms_file *kfile = file->private_data;

	if (kfile->pending)
		give_up(kfile->pending);
	if (kfile->channel)
		give_up(kfile->channel);
	mutex_lock(&kucomms_lock);
	kfile->device->opens--;
	mutex_unlock(&kucomms_lock);
	kfree(kfile);
	return 0;
}

/* ---- setting up ---------------------------------------------------------- */

static_assert(sizeof(struct kucomms_setup) == 184);
static_assert(offsetof(struct kucomms_setup, flags) == 120);
static_assert(offsetof(struct kucomms_setup, channel) == 124);

static int check_setup(const struct kucomms_setup *setup)
{
	if (setup->version != KUCOMMS_ABI_VERSION ||
	    setup->features & ~KUCOMMS_FEATURES)
		return -EPROTONOSUPPORT;
	if (setup->hello_length > KUCOMMS_HELLO_MAX || setup->page_size ||
	    setup->side_size || setup->side_offset[0] ||
	    setup->side_offset[1] || setup->flags & ~KUCOMMS_SETUP_NUMBER ||
	    (setup->channel && !(setup->flags & KUCOMMS_SETUP_NUMBER)) ||
	    memchr_inv(setup->reserved, 0, sizeof(setup->reserved)))
		return -EINVAL;
	return 0;
}

static void answer_setup(struct kucomms_setup *setup,
			 const struct kucomms_channel *channel,
			 const struct kucomms_endpoint_options *options)
{
	u64 side_size = (u64)channel->side_pages << PAGE_SHIFT;

	memset(setup, 0, sizeof(*setup));
	setup->version = KUCOMMS_ABI_VERSION;
	setup->features = channel->features;
	setup->ring_size = channel->ring_size;
	setup->page_size = PAGE_SIZE;
	setup->side_size = side_size;
	setup->side_offset[1] = side_size;
	setup->hello_length = options->hello_length;
	memcpy(setup->hello, options->hello, options->hello_length);
	if (channel->number >= 0) {
		setup->flags = KUCOMMS_SETUP_NUMBER;
		setup->channel = channel->number;
	}
}

/**
 * struct kucomms_terms - what a channel has to be like for an endpoint
 * @endpoint: its serial
 * @ring_size: of each ring
 * @features: in force
 * @pool_bytes: that all pools of the user may have
 * @flags: its options
 * @uid: of the user that sets the channel up
 * @wanted: the number that is asked for, or -1
 * @news: the device's, before it was asked
 */
struct kucomms_terms {
	u64 endpoint;
	u64 ring_size;
	u64 features;
	u64 pool_bytes;
	u32 flags;
	kuid_t uid;
	s64 wanted;
	u64 news;
};

/* What is in force of the features that the user knows. */
static u64 features_for(const struct kucomms_endpoint_options *options,
			u64 known)
{
	u64 features = known & ~KUCOMMS_FEATURE_TURNS;

	/* Who listens decides on turns, and both on the others. */
	if (options->flags & KUCOMMS_TURNS)
		features |= KUCOMMS_FEATURE_TURNS;
	/* The offsets of mmap() of 32 bits end within the pools. */
	if (!(options->flags & KUCOMMS_POOLS) || in_compat_syscall())
		features &= ~KUCOMMS_FEATURE_POOLS;
	return features;
}

/*
 * The terms of the endpoint for a set-up that wants this. Return: 0, -ENOTCONN,
 * -EPROTONOSUPPORT when the user does not know a feature that it needs, or as
 * kucomms_endpoint_admits(): before anything is allocated in vain.
 */
static int ask_for_terms(struct kucomms_device *device,
			 const struct kucomms_setup *setup,
			 struct kucomms_terms *terms)
{
	const struct kucomms_endpoint_options *options;
	int err = -ENOTCONN;
	u64 asked;

	terms->wanted = -1;
	if (setup->flags & KUCOMMS_SETUP_NUMBER)
		terms->wanted = setup->channel;
	/* pairs with atomic64_inc_return() in tell_news() */
	terms->news = atomic64_read_acquire(&device->news);
	mutex_lock(&kucomms_lock);
	if (device->endpoint) {
		options = &device->endpoint->options;
		terms->endpoint = device->endpoint->serial;
		asked = clamp_t(u64, setup->ring_size ?: options->ring_size,
				PAGE_SIZE, options->max_ring_size);
		terms->ring_size = roundup_pow_of_two(asked);
		terms->flags = options->flags;
		terms->pool_bytes = options->max_pool_bytes;
		terms->features = features_for(options, setup->features);
		err = kucomms_endpoint_admits(device->endpoint, terms->wanted,
					      terms->uid);
		if (err >= 0 || err == -ENOENT)
			err = 0;
		if (terms->features & ~setup->features)
			err = -EPROTONOSUPPORT;
	}
	mutex_unlock(&kucomms_lock);
	return err;
}

/* All that is allocated for a channel; most of it is charged to the caller. */
static int prepare(struct kucomms_file *kfile,
		   const struct kucomms_terms *terms,
		   struct kucomms_channel **channel,
		   struct kucomms_runner **runner)
{
	int err;

	*runner = NULL;
	*channel = kucomms_channel_new(terms->ring_size, terms->features);
	if (IS_ERR(*channel))
		return PTR_ERR(*channel);
	err = -ENOMEM;
	(*channel)->user = kzalloc(sizeof(*(*channel)->user),
				   GFP_KERNEL_ACCOUNT);
	if (!(*channel)->user)
		goto err_put;
	if ((*channel)->pools)
		(*channel)->pools->limit = terms->pool_bytes;
	if (terms->flags & KUCOMMS_RX_IN_PLACE) {
		(*channel)->held = kcalloc(KUCOMMS_HOLD_LIMIT,
					   sizeof(*(*channel)->held),
					   GFP_KERNEL_ACCOUNT);
		if (!(*channel)->held)
			goto err_put;
	}
	if (!(terms->flags & KUCOMMS_THREAD_PER_CHANNEL))
		return 0;
	*runner = kucomms_runner_new(kfile->device->name);
	if (IS_ERR(*runner)) {
		/* To the user, EAGAIN says that there will be news. */
		err = PTR_ERR(*runner) == -EAGAIN ? -ENOMEM : PTR_ERR(*runner);
		goto err_put;
	}
	if (terms->flags & KUCOMMS_RX_IN_PLACE)
		return 0;
	err = kucomms_runner_grow(*runner, *channel, GFP_KERNEL_ACCOUNT);
	if (!err)
		return 0;

	kucomms_runner_stop(*runner);
err_put:
	kucomms_channel_put(*channel);
	return err;
}

/*
 * Give what was prepared to the endpoint that it was prepared for, and tell of
 * that one. Return: 0, -ENOTCONN, -ESTALE when there is another by now, or as
 * kucomms_endpoint_attach().
 */
static int hand_over(struct kucomms_file *kfile,
		     const struct kucomms_terms *terms,
		     struct kucomms_channel *channel,
		     struct kucomms_runner *runner)
{
	struct kucomms_endpoint *endpoint;
	int err = -ENOTCONN;

	mutex_lock(&kucomms_lock);
	endpoint = kfile->device->endpoint;
	if (endpoint && endpoint->serial != terms->endpoint)
		err = -ESTALE;
	else if (endpoint)
		err = kucomms_endpoint_attach(endpoint, channel, runner,
					      terms->wanted);
	if (!err)
		answer_setup(&kfile->answer, channel, &endpoint->options);
	mutex_unlock(&kucomms_lock);
	return err;
}

/* Let the answer for a channel be waited for, or no more: @channel is NULL. */
static void set_pending(struct kucomms_file *kfile,
			struct kucomms_channel *channel)
{
	spin_lock(&kfile->pending_lock);
	kfile->pending = channel;
	spin_unlock(&kfile->pending_lock);
}

/*
 * One try. Return: 0 when a channel is pending, -ESTALE when there is another
 * endpoint by now, -EINPROGRESS when a channel that is wanted just ends, other
 * errors.
 */
static int ask_for_channel(struct kucomms_file *kfile,
			   const struct kucomms_setup *setup,
			   struct kucomms_terms *terms)
{
	struct kucomms_channel *channel;
	struct kucomms_runner *runner;
	int err;

	err = ask_for_terms(kfile->device, setup, terms);
	if (!err)
		err = prepare(kfile, terms, &channel, &runner);
	if (err)
		return err;
	channel->pid = kfile->pid;
	channel->uid = terms->uid;
	channel->hello_length = setup->hello_length;
	memcpy(channel->hello, setup->hello, setup->hello_length);
	err = hand_over(kfile, terms, channel, runner);
	if (err) {
		if (runner)
			kucomms_runner_stop(runner);
		kucomms_channel_put(channel);
		return err;
	}
	set_pending(kfile, channel);
	kucomms_debugfs_add(channel, kfile->device->name);
	return 0;
}

/* Has anything changed since these terms were asked for? */
static bool has_news(struct kucomms_device *device, u64 seen)
{
	return atomic64_read(&device->news) != seen;
}

static bool is_answered(const struct kucomms_channel *channel)
{
	/* pairs with smp_store_release() in answer() */
	return smp_load_acquire(&channel->answered);
}

/* A channel that is wanted just ends. Return: -ESTALE: try again; or -errno. */
static int wait_for_news(struct file *file, const struct kucomms_terms *terms)
{
	struct kucomms_file *kfile = file->private_data;
	struct kucomms_device *device = kfile->device;

	if (file->f_flags & O_NONBLOCK)
		return -EAGAIN;
	return ___wait_event(device->wait, has_news(device, terms->news),
			     KUCOMMS_SLEEP, 0, -ESTALE, schedule());
}

/* Ask until there is an answer. Return: 0 when a channel is pending. */
static int ask(struct file *file, const struct kucomms_setup *setup)
{
	struct kucomms_terms terms = { .uid = file->f_cred->euid };
	struct kucomms_file *kfile = file->private_data;
	int err;

	/* Each time round, an endpoint or a channel went. */
	do {
		err = ask_for_channel(kfile, setup, &terms);
		if (err == -EINPROGRESS)
			err = wait_for_news(file, &terms);
		if (err == -ESTALE && signal_pending(current))
			err = -ERESTARTSYS;
	} while (err == -ESTALE);
	if (err == -ECHRNG || err == -EADDRINUSE || err == -EBUSY ||
	    err == -EDQUOT || err == -EAGAIN)
		WRITE_ONCE(kfile->seen, terms.news);
	else
		WRITE_ONCE(kfile->seen, 0);
	return err;
}

/* What the endpoint says of the channel that is pending; wait for it. */
static int take_answer(struct file *file, struct kucomms_setup *setup)
{
	struct kucomms_file *kfile = file->private_data;
	struct kucomms_channel *channel = kfile->pending;
	int err = 0;

	if (!is_answered(channel) && (file->f_flags & O_NONBLOCK))
		return -EINPROGRESS;
	err = ___wait_event(channel->wait, is_answered(channel), KUCOMMS_SLEEP,
			    0, 0, schedule());
	if (!err)
		err = channel->open_result;
	set_pending(kfile, NULL);
	if (err) {
		give_up(channel);
		return err;
	}
	*setup = kfile->answer;
	/* pairs with smp_load_acquire() in channel_of() */
	smp_store_release(&kfile->channel, channel);
	return 0;
}

static int set_up(struct file *file, struct kucomms_setup *setup)
{
	struct kucomms_file *kfile = file->private_data;
	int err = 0;

	if (kfile->channel)
		return -EALREADY;
	if (!kfile->pending)
		err = ask(file, setup);
	return err ?: take_answer(file, setup);
}

/* Tell who knows other things than we do what we know. Return: the error. */
static int refuse_setup(struct kucomms_setup __user *asked)
{
	if (put_user(KUCOMMS_ABI_VERSION, &asked->version) ||
	    put_user(KUCOMMS_FEATURES, &asked->features))
		return -EFAULT;
	return -EPROTONOSUPPORT;
}

static long ioctl_setup(struct file *file,
			struct kucomms_setup __user *argument)
{
	struct kucomms_file *kfile = file->private_data;
	struct kucomms_setup setup;
	int err;

	if (copy_from_user(&setup, argument, sizeof(setup)))
		return -EFAULT;
	err = check_setup(&setup);
	if (err == -EPROTONOSUPPORT)
		return refuse_setup(argument);
	if (err)
		return err;
	/* So that nothing has to be undone if the answer cannot be given. */
	if (copy_to_user(argument, &setup, sizeof(setup)))
		return -EFAULT;
	/* Another thread may wait with it for as long as it likes. */
	if (!mutex_trylock(&kfile->lock))
		return -EALREADY;
	err = set_up(file, &setup);
	mutex_unlock(&kfile->lock);
	if (err == -EPROTONOSUPPORT)
		return refuse_setup(argument);
	if (!err && copy_to_user(argument, &setup, sizeof(setup)))
		return -EFAULT;
	return err;
}

/* ---- doorbells ----------------------------------------------------------- */

/* Why nothing goes any more, or 0. */
static int ended(struct kucomms_channel *channel)
{
	if (test_bit(KUCOMMS_BROKEN, &channel->state))
		return -EPROTO;
	if (test_bit(KUCOMMS_HUNG_UP, &channel->state) ||
	    test_bit(KUCOMMS_USER_GONE, &channel->state))
		return -ESHUTDOWN;
	return 0;
}

static long ioctl_kick(struct kucomms_channel *channel)
{
	int err = ended(channel);

	if (err)
		return err;
	atomic64_inc(&channel->doorbells_heard);
	kucomms_channel_kick(channel);
	return 0;
}

static u32 wait_events(struct kucomms_channel *channel, u32 wanted)
{
	__poll_t events = kucomms_channel_events(channel);
	u32 come = 0;

	if (events & EPOLLIN)
		come |= KUCOMMS_WAIT_DATA;
	if (events & EPOLLOUT)
		come |= KUCOMMS_WAIT_SPACE;
	return come & wanted;
}

static bool wait_is_over(struct kucomms_channel *channel, u32 wanted)
{
	return wait_events(channel, wanted) || ended(channel);
}

/*
 * What wait_event_interruptible_hrtimeout() does; but that macro would have us
 * read the timer's sleeper while the timer writes it.
 * @end: when to give up, or NULL
 */
static int sleep_until_rung(struct kucomms_channel *channel, u32 wanted,
			    ktime_t *end)
{
	struct wait_queue_entry entry;
	bool expired = false;
	int err;

	init_wait_entry(&entry, 0);
	for (;;) {
		err = prepare_to_wait_event(&channel->wait, &entry,
					    KUCOMMS_SLEEP);
		if (wait_is_over(channel, wanted)) {
			err = 0;
			break;
		}
		if (!err && expired)
			err = -ETIMEDOUT;
		if (err)
			break;
		expired = !schedule_hrtimeout_range(end,
						    current->timer_slack_ns,
						    HRTIMER_MODE_ABS);
	}
	finish_wait(&channel->wait, &entry);
	return err;
}

/* Sleep, and after a signal have @wait tell what is left of the time. */
static int wait_for(struct kucomms_channel *channel, struct kucomms_wait *wait)
{
	ktime_t end;
	int err;

	if (wait->timeout_ns < 0)
		return sleep_until_rung(channel, wait->events, NULL);
	end = ktime_add_safe(ktime_get(), ns_to_ktime(wait->timeout_ns));
	err = sleep_until_rung(channel, wait->events, &end);
	if (err == -ERESTARTSYS)
		wait->timeout_ns = max_t(s64, ktime_sub(end, ktime_get()), 0);
	return err;
}

static int check_wait(const struct kucomms_wait *wait)
{
	if (!wait->events || wait->reserved || wait->timeout_ns < -1 ||
	    wait->events & ~(KUCOMMS_WAIT_DATA | KUCOMMS_WAIT_SPACE))
		return -EINVAL;
	return 0;
}

static long ioctl_wait(struct file *file, struct kucomms_channel *channel,
		       void __user *argument)
{
	struct kucomms_wait wait;
	int err;

	if (copy_from_user(&wait, argument, sizeof(wait)))
		return -EFAULT;
	err = check_wait(&wait);
	if (err)
		return err;
	if (!wait_is_over(channel, wait.events)) {
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		err = wait_for(channel, &wait);
	}
	if (!err)
		err = ended(channel);
	if (!err)
		wait.events = wait_events(channel, wait.events);
	else if (err != -ERESTARTSYS)
		return err;
	/* Begun again after a signal, it waits for the rest of the time. */
	return copy_to_user(argument, &wait, sizeof(wait)) ? -EFAULT : err;
}

static bool is_for_both(const struct file *file)
{
	return file->f_mode & FMODE_READ && file->f_mode & FMODE_WRITE;
}

static long ioctl_pool(struct file *file, struct kucomms_channel *channel,
		       long (*what)(struct kucomms_channel *channel,
				    void __user *argument),
		       void __user *argument)
{
	if (!is_for_both(file))
		return -EBADF;
	if (!channel)
		return -ENOTCONN;
	return ended(channel) ?: what(channel, argument);
}

static long device_ioctl(struct file *file, unsigned int command,
			 unsigned long value)
{
	struct kucomms_channel *channel = channel_of(file);
	void __user *argument = (void __user *)value;

	switch (command) {
	case KUCOMMS_IOC_SETUP:
		return is_for_both(file) ? ioctl_setup(file, argument) : -EBADF;
	case KUCOMMS_IOC_KICK:
		return channel ? ioctl_kick(channel) : -ENOTCONN;
	case KUCOMMS_IOC_WAIT:
		return channel ? ioctl_wait(file, channel, argument) :
				 -ENOTCONN;
	case KUCOMMS_IOC_OPEN_POOL:
		return ioctl_pool(file, channel, kucomms_ioctl_open_pool,
				  argument);
	case KUCOMMS_IOC_CLOSE_POOL:
		return ioctl_pool(file, channel, kucomms_ioctl_close_pool,
				  argument);
	default:
		return -ENOTTY;
	}
}

/* Is there an answer that a set-up has not waited for? */
static bool has_answer(struct kucomms_file *kfile)
{
	bool has;

	spin_lock(&kfile->pending_lock);
	has = kfile->pending && is_answered(kfile->pending);
	spin_unlock(&kfile->pending_lock);
	return has;
}

static __poll_t device_poll(struct file *file, poll_table *table)
{
	struct kucomms_channel *channel = channel_of(file);
	struct kucomms_file *kfile = file->private_data;
	__poll_t events = 0;
	u64 seen;

	if (channel) {
		poll_wait(file, &channel->wait, table);
		return kucomms_channel_events(channel);
	}
	poll_wait(file, &kfile->device->wait, table);
	if (READ_ONCE(kfile->device->endpoint))
		events |= EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM;
	seen = READ_ONCE(kfile->seen);
	if ((seen && has_news(kfile->device, seen)) || has_answer(kfile))
		events |= EPOLLPRI;
	return events;
}

static int device_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kucomms_channel *channel = channel_of(file);

	if (!channel)
		return -ENOTCONN;
	return kucomms_is_of_pool(vma) ? kucomms_pool_mmap(channel, vma) :
					 kucomms_channel_mmap(channel, vma);
}

const struct file_operations kucomms_fops = {
	.owner		= THIS_MODULE,
	.open		= device_open,
	.release	= device_release,
	.unlocked_ioctl	= device_ioctl,
	/* The structures are the same for 32 and 64 bits. */
	.compat_ioctl	= compat_ptr_ioctl,
	.poll		= device_poll,
	.mmap		= device_mmap,
};
