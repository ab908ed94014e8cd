// SPDX-License-Identifier: GPL-2.0-only
/*
 * A character device: read() and write() of one message each, out of and into a
 * queue of slots, copied once, from or to the user.
 */

#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/poll.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "internal.h"

/**
 * struct queue - of messages, one writer and one reader at a time
 * @lock: against more than one of the user's
 * @slots: KBENCH_SLOTS of them
 * @head: messages that were ever put in
 * @tail: messages that were ever taken out
 * @wait: for whoever waits for one
 */
struct queue {
	struct mutex lock;	/* against more than one of the user's */
	u64 (*slots)[KBENCH_WORDS];
	u64 head;
	u64 tail;
	wait_queue_head_t wait;
};

static struct queue to_kernel, to_user;

static int queue_init(struct queue *queue)
{
	mutex_init(&queue->lock);
	init_waitqueue_head(&queue->wait);
	queue->slots = vzalloc(array_size(KBENCH_SLOTS, KBENCH_SIZE));
	return queue->slots ? 0 : -ENOMEM;
}

/* The next to take out, or NULL. */
static u64 *queue_front(struct queue *queue)
{
	/* pairs with smp_store_release() in queue_put() */
	if (smp_load_acquire(&queue->head) == queue->tail)
		return NULL;
	return queue->slots[queue->tail % KBENCH_SLOTS];
}

static void queue_take(struct queue *queue)
{
	/* pairs with smp_load_acquire() in queue_room() */
	smp_store_release(&queue->tail, queue->tail + 1);
}

/* Where to put the next, or NULL. */
static u64 *queue_room(struct queue *queue)
{
	/* pairs with smp_store_release() in queue_take() */
	if (queue->head - smp_load_acquire(&queue->tail) == KBENCH_SLOTS)
		return NULL;
	return queue->slots[queue->head % KBENCH_SLOTS];
}

static void queue_put(struct queue *queue)
{
	/* pairs with smp_load_acquire() in queue_front() */
	smp_store_release(&queue->head, queue->head + 1);
	if (wq_has_sleeper(&queue->wait))
		wake_up_interruptible(&queue->wait);
}

/* ---- the device -------------------------------------------------------------- */

static ssize_t device_write(struct file *file, const char __user *data, size_t length,
			    loff_t *position)
{
	ssize_t result = length;
	u64 *slot;

	if (length != KBENCH_SIZE)
		return -EINVAL;
	if (mutex_lock_interruptible(&to_kernel.lock))
		return -ERESTARTSYS;
	slot = queue_room(&to_kernel);
	if (!slot)
		result = -EAGAIN;
	else if (copy_from_user(slot, data, length))
		result = -EFAULT;
	else
		queue_put(&to_kernel);
	mutex_unlock(&to_kernel.lock);
	return result;
}

static ssize_t device_read(struct file *file, char __user *data, size_t length,
			   loff_t *position)
{
	ssize_t result = length;
	const u64 *slot;

	if (length != KBENCH_SIZE)
		return -EINVAL;
	if (mutex_lock_interruptible(&to_user.lock))
		return -ERESTARTSYS;
	slot = queue_front(&to_user);
	if (!slot)
		result = -EAGAIN;
	else if (copy_to_user(data, slot, length))
		result = -EFAULT;
	else
		queue_take(&to_user);
	mutex_unlock(&to_user.lock);
	return result;
}

static __poll_t device_poll(struct file *file, poll_table *table)
{
	__poll_t events = 0;

	poll_wait(file, &to_user.wait, table);
	if (queue_front(&to_user))
		events |= EPOLLIN | EPOLLRDNORM;
	if (queue_room(&to_kernel))
		events |= EPOLLOUT | EPOLLWRNORM;
	return events;
}

static const struct file_operations fops = {
	.owner	= THIS_MODULE,
	.read	= device_read,
	.write	= device_write,
	.poll	= device_poll,
};

static struct miscdevice device = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= KBENCH_QUEUE,
	.fops	= &fops,
	.mode	= 0600,
};

/* ---- the kernel's side ------------------------------------------------------- */

static int send_burst(u64 first, u32 count)
{
	u64 number, *slot;

	for (number = first; number < first + count; number++) {
		slot = queue_room(&to_user);
		if (!slot)
			return -ENOBUFS;
		kbench_fill(slot, number, kbench_run.start.full);
		queue_put(&to_user);
	}
	return 0;
}

static int receive_burst(u64 first, u32 count)
{
	const u64 *slot;
	u64 number;

	for (number = first; number < first + count; number++) {
		slot = queue_front(&to_kernel);
		if (!slot || !kbench_check(slot, number))
			return -EBADMSG;
		queue_take(&to_kernel);
	}
	return 0;
}

static int receive_first(u64 number)
{
	int err = wait_event_interruptible(to_kernel.wait, queue_front(&to_kernel));

	return err ?: receive_burst(number, 1);
}

static int start(const struct kbench_start *start)
{
	to_kernel.tail = to_kernel.head;
	to_user.tail = to_user.head;
	return 0;
}

static void exit_device(void)
{
	misc_deregister(&device);
	vfree(to_kernel.slots);
	vfree(to_user.slots);
}

static int init(void)
{
	int err = queue_init(&to_kernel);

	if (!err)
		err = queue_init(&to_user);
	if (!err)
		err = misc_register(&device);
	if (!err)
		return 0;
	vfree(to_kernel.slots);
	vfree(to_user.slots);
	return err;
}

const struct kbench_mechanism kbench_chardev = {
	.init = init,
	.exit = exit_device,
	.start = start,
	.send = send_burst,
	.first = receive_first,
	.receive = receive_burst,
};
