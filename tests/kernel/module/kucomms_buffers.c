// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exercises pools and buffers from inside. The type of a message says what to do
 * with it and its buffers, its data are the arguments, and most are answered by a
 * reply that is an array of 64-bit numbers; tests/kernel/test_pool.py is the other
 * half.
 *
 *	kucomms_buffers			one thread
 *	kucomms_buffers_in_place	KUCOMMS_RX_IN_PLACE, a thread for each channel
 */
#include <linux/atomic.h>
#include <linux/err.h>
#include <linux/hrtimer.h>
#include <linux/kernel.h>
#include <linux/minmax.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/workqueue.h>

#include <kucomms/kucomms.h>

/* What to do with a message. */
enum {
	DO_ECHO,		/* send it back, with its buffers */
	DO_NOTHING,
	DO_SUM,			/* answer the length of each buffer and the sum of its bytes */
	DO_TAKE,		/* keep its buffers */
	DO_FREE,		/* what is kept, in a context */
	DO_SEND_KEPT,		/* in one message, with so many bytes of data */
	DO_OPEN,		/* a pool of SIZE with FLAGS */
	DO_CLOSE,		/* the pool of this INDEX */
	DO_ALLOCATE,		/* of the pool INDEX, LENGTH, COUNT times; filled, and kept */
	DO_RETRY,		/* send a buffer of pool INDEX, LENGTH, as soon as there is one */
	DO_WRONG,		/* with its buffer: what must not be done */
	DO_RETRY_TAKEN,		/* its first buffer is taken, the message comes again */
	DO_HOLD,		/* the message; what is left of it is answered in the next one */
	DO_STATUS,
	DO_UNLOCKED,		/* as DO_ECHO, by kucomms_send_unlocked() */
	DO_WRITE,		/* BYTE into all of its buffers, which go back */
	DO_FREE_OTHERS,		/* as DO_FREE, what the first channel keeps */
	DO_RETRY_BOTH,		/* as DO_RETRY, for two buffers in one message, or none */
};

/* Types of what comes without being a reply. */
#define BUFFERS_SENT	1000

enum { FREE_HERE, FREE_HARD, FREE_WORK };

#define BUFFERS_POOLS	70
#define BUFFERS_KEPT	4096

struct buffers_channel {
	struct kucomms_channel *channel;
	struct kucomms_pool *pools[BUFFERS_POOLS];
	u64 pool_count;
	struct kucomms_buffer *kept[BUFFERS_KEPT];
	u32 kept_count;
	struct kucomms_buffer *going[BUFFERS_KEPT];
	u32 going_count;
	u64 available;
	u64 available_freed;
	u64 woken;
	u64 tries;
	struct kucomms_message *held;
	struct hrtimer hard;
	struct work_struct work;
};

static u64 buffers_argument(const struct kucomms_message *message, int i)
{
	const u64 *data = message->data;

	return message->length >= (i + 1) * sizeof(u64) ? READ_ONCE(data[i]) : 0;
}

static void buffers_answer(struct kucomms_channel *channel, const struct kucomms_message *message,
			   const void *data, u32 length)
{
	if (kucomms_reply(channel, message, data, length) == -EAGAIN)
		kucomms_retry(channel);
}

static void buffers_answer_number(struct kucomms_channel *channel,
				  const struct kucomms_message *message, s64 number)
{
	buffers_answer(channel, message, &number, sizeof(number));
}

static void buffers_free_going(struct buffers_channel *test)
{
	u32 count = test->going_count, i;

	for (i = 0; i < count; i++)
		kucomms_free_buffer(test->going[i]);
	/* pairs with smp_load_acquire() in buffers_free_kept() */
	smp_store_release(&test->going_count, 0);
}

static enum hrtimer_restart buffers_free_hard(struct hrtimer *timer)
{
	buffers_free_going(container_of(timer, struct buffers_channel, hard));
	return HRTIMER_NORESTART;
}

static void buffers_free_work(struct work_struct *work)
{
	buffers_free_going(container_of(work, struct buffers_channel, work));
}

/* What is kept is the callbacks': who frees it elsewhere has got a list of his own. */
static void buffers_free_kept(struct buffers_channel *test, u64 context)
{
	/* pairs with smp_store_release() in buffers_free_going() */
	while (smp_load_acquire(&test->going_count))
		cond_resched();
	memcpy(test->going, test->kept, test->kept_count * sizeof(*test->kept));
	test->available_freed = test->available;
	WRITE_ONCE(test->going_count, test->kept_count);
	test->kept_count = 0;
	if (context == FREE_HARD)
		hrtimer_start(&test->hard, NSEC_PER_USEC, HRTIMER_MODE_REL_HARD);
	else if (context == FREE_WORK)
		schedule_work(&test->work);
	else
		buffers_free_going(test);
}

static void buffers_sum(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	u64 *answer = kcalloc(2 * KUCOMMS_CARRIED_MAX, sizeof(*answer), GFP_KERNEL);
	u64 length, i, k;
	const u8 *data;

	if (!answer)
		return;
	for (i = 0; i < message->buffer_count; i++) {
		data = kucomms_buffer_data(message->buffers[i]);
		length = kucomms_buffer_length(message->buffers[i]);
		answer[2 * i] = length;
		for (k = 0; k < length; k++) {
			answer[2 * i + 1] += READ_ONCE(data[k]);
			if (!(k % SZ_64K))
				cond_resched();
		}
	}
	buffers_answer(channel, message, answer, 2 * message->buffer_count * sizeof(*answer));
	kfree(answer);
}

static void buffers_take(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_buffer *buffer;
	u32 i;

	for (i = 0; i < message->buffer_count && test->kept_count < BUFFERS_KEPT; i++) {
		buffer = kucomms_take_buffer(test->channel, message, i);
		if (!IS_ERR(buffer))
			test->kept[test->kept_count++] = buffer;
	}
}

static int buffers_send(struct buffers_channel *test, struct kucomms_buffer **buffers, u32 count,
			u32 length)
{
	struct kucomms_message message = {
		.type = BUFFERS_SENT,
		.length = length,
		.data = kzalloc(length, GFP_KERNEL),
		.buffers = buffers,
		.buffer_count = count,
	};
	int err = message.data ? kucomms_send(test->channel, &message) : -ENOMEM;

	kfree(message.data);
	return err;
}

static void buffers_send_kept(struct buffers_channel *test, const struct kucomms_message *message)
{
	u32 count = min_t(u32, test->kept_count, KUCOMMS_CARRIED_MAX), length;
	int err;

	length = min_t(u64, buffers_argument(message, 0), SZ_64K);
	err = buffers_send(test, test->kept + test->kept_count - count, count, length);
	if (!err)
		test->kept_count -= count;
	if (err == -EAGAIN)
		kucomms_retry(test->channel);
	else if (err)
		buffers_answer_number(test->channel, message, err);
}

static void buffers_open_pool(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_pool *pool;

	if (test->pool_count == BUFFERS_POOLS)
		return;
	pool = kucomms_open_pool(test->channel, buffers_argument(message, 0),
				 buffers_argument(message, 1));
	if (!IS_ERR(pool))
		test->pools[test->pool_count++] = pool;
	buffers_answer_number(test->channel, message, PTR_ERR_OR_ZERO(pool));
}

static struct kucomms_pool *buffers_pool(struct buffers_channel *test, u64 i)
{
	return i < test->pool_count ? test->pools[i] : NULL;
}

static void buffers_close_pool(struct buffers_channel *test, const struct kucomms_message *message)
{
	u64 i = buffers_argument(message, 0);

	if (!buffers_pool(test, i))
		return;
	kucomms_close_pool(test->pools[i]);
	test->pools[i] = NULL;
}

static void buffers_allocate(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_pool *pool = buffers_pool(test, buffers_argument(message, 0));
	u64 count = buffers_argument(message, 2);
	struct kucomms_buffer *buffer;
	s64 done = 0;

	while (pool && count-- && test->kept_count < BUFFERS_KEPT) {
		buffer = kucomms_allocate(pool, buffers_argument(message, 1));
		if (IS_ERR(buffer)) {
			done = done ?: PTR_ERR(buffer);
			break;
		}
		done++;
		memset(kucomms_buffer_data(buffer), done, kucomms_buffer_length(buffer));
		test->kept[test->kept_count++] = buffer;
	}
	buffers_answer_number(test->channel, message, done);
}

static void buffers_retry(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_pool *pool = buffers_pool(test, buffers_argument(message, 0));
	struct kucomms_buffer *buffer;
	int err;

	if (!pool)
		return;
	test->tries++;
	buffer = kucomms_allocate(pool, buffers_argument(message, 1));
	if (IS_ERR(buffer)) {
		if (PTR_ERR(buffer) == -ENOBUFS)
			kucomms_retry(test->channel);
		return;
	}
	test->woken = test->available - test->available_freed;
	err = buffers_send(test, &buffer, 1, 0);
	if (err)
		kucomms_free_buffer(buffer);
	if (err == -EAGAIN)
		kucomms_retry(test->channel);
}

static void buffers_retry_both(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_pool *pool = buffers_pool(test, buffers_argument(message, 0));
	struct kucomms_buffer *both[2];
	u32 count;

	if (!pool)
		return;
	test->tries++;
	for (count = 0; count < 2; count++) {
		both[count] = kucomms_allocate(pool, buffers_argument(message, 1));
		if (IS_ERR(both[count]))
			break;
	}
	if (count == 2 && !buffers_send(test, both, 2, 0))
		return;
	if (count < 2 && PTR_ERR(both[count]) == -ENOBUFS)
		kucomms_retry(test->channel);
	while (count--)
		kucomms_free_buffer(both[count]);
}

/* The first of kucomms_buffers, whose callbacks all run in one thread. */
static struct kucomms_channel *buffers_other;

/* Each of these has to be refused, and leave the buffer what it was. */
static void buffers_wrong(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_buffer *twice[] = { message->buffers[0], message->buffers[0] };
	struct kucomms_buffer *none[] = { NULL };
	struct kucomms_message wrong = { .type = BUFFERS_SENT, .buffers = twice };
	struct kucomms_channel *other = READ_ONCE(buffers_other);
	s64 answer[7];

	wrong.buffer_count = 2;
	answer[0] = kucomms_send(test->channel, &wrong);
	wrong.buffers = none;
	wrong.buffer_count = 1;
	answer[1] = kucomms_send(test->channel, &wrong);
	wrong.buffers = twice;
	wrong.buffer_count = KUCOMMS_CARRIED_MAX + 1;
	answer[2] = kucomms_send(test->channel, &wrong);
	wrong.buffer_count = 1;
	wrong.length = U32_MAX;
	answer[3] = kucomms_send(test->channel, &wrong);
	wrong.length = 0;
	answer[4] = other && other != test->channel ? kucomms_send(other, &wrong) : -EINVAL;
	answer[5] = PTR_ERR_OR_ZERO(kucomms_take_buffer(test->channel, message,
							message->buffer_count));
	answer[6] = PTR_ERR_OR_ZERO(kucomms_take_buffer(test->channel, &wrong, 0));
	buffers_answer(test->channel, message, answer, sizeof(answer));
}

static void buffers_retry_taken(struct buffers_channel *test,
				const struct kucomms_message *message)
{
	u64 answer[] = { message->buffer_count, 0 };
	u32 i;

	if (!test->tries++) {
		buffers_take(test, message);
		test->kept_count--;
		kucomms_free_buffer(test->kept[test->kept_count]);
		kucomms_retry(test->channel);
		kucomms_resume(test->channel);
		return;
	}
	for (i = 0; i < message->buffer_count; i++)
		answer[1] += !!message->buffers[i];
	buffers_answer(test->channel, message, answer, sizeof(answer));
}

static void buffers_hold(struct buffers_channel *test, const struct kucomms_message *message)
{
	struct kucomms_message *held = test->held;

	if (held) {
		u64 answer[] = { held->length, held->buffer_count, *(u8 *)held->data };

		kucomms_let_go(test->channel, held);
		test->held = NULL;
		buffers_answer(test->channel, message, answer, sizeof(answer));
		return;
	}
	held = kucomms_hold(test->channel, message);
	if (IS_ERR(held))
		buffers_answer_number(test->channel, message, PTR_ERR(held));
	else
		test->held = held;
}

static void buffers_write(struct buffers_channel *test, const struct kucomms_message *message)
{
	u32 i;

	for (i = 0; i < message->buffer_count; i++)
		memset(kucomms_buffer_data(message->buffers[i]), buffers_argument(message, 0),
		       kucomms_buffer_length(message->buffers[i]));
	if (kucomms_send(test->channel, message) == -EAGAIN)
		kucomms_retry(test->channel);
}

static void buffers_message(struct kucomms_channel *channel, const struct kucomms_message *message)
{
	struct buffers_channel *test = kucomms_channel_priv(channel);
	u64 status[] = { test->kept_count, test->available, test->tries, test->woken };
	struct kucomms_channel *other = READ_ONCE(buffers_other);

	switch (message->type) {
	case DO_NOTHING:
		break;
	case DO_SUM:
		buffers_sum(channel, message);
		break;
	case DO_TAKE:
		buffers_take(test, message);
		break;
	case DO_FREE:
		buffers_free_kept(test, buffers_argument(message, 0));
		break;
	case DO_FREE_OTHERS:
		/* Its callbacks run in our thread. */
		if (other && !kucomms_priv(kucomms_channel_endpoint(channel)))
			buffers_free_kept(kucomms_channel_priv(other),
					  buffers_argument(message, 0));
		break;
	case DO_RETRY_BOTH:
		buffers_retry_both(test, message);
		break;
	case DO_SEND_KEPT:
		buffers_send_kept(test, message);
		break;
	case DO_OPEN:
		buffers_open_pool(test, message);
		break;
	case DO_CLOSE:
		buffers_close_pool(test, message);
		break;
	case DO_ALLOCATE:
		buffers_allocate(test, message);
		break;
	case DO_RETRY:
		buffers_retry(test, message);
		break;
	case DO_WRONG:
		if (message->buffer_count)
			buffers_wrong(test, message);
		break;
	case DO_RETRY_TAKEN:
		if (message->buffer_count)
			buffers_retry_taken(test, message);
		break;
	case DO_HOLD:
		buffers_hold(test, message);
		break;
	case DO_STATUS:
		buffers_answer(channel, message, status, sizeof(status));
		break;
	case DO_UNLOCKED:
		if (kucomms_send_unlocked(channel, message) == -EAGAIN)
			kucomms_retry(channel);
		break;
	case DO_WRITE:
		buffers_write(test, message);
		break;
	default:
		if (kucomms_send(channel, message) == -EAGAIN)
			kucomms_retry(channel);
	}
}

static void buffers_available(struct kucomms_channel *channel)
{
	struct buffers_channel *test = kucomms_channel_priv(channel);

	test->available++;
}

static int buffers_open(struct kucomms_channel *channel, const struct kucomms_peer *peer)
{
	struct buffers_channel *test = kvzalloc(sizeof(*test), GFP_KERNEL);

	if (!test)
		return -ENOMEM;
	test->channel = channel;
	hrtimer_init(&test->hard, CLOCK_MONOTONIC, HRTIMER_MODE_REL_HARD);
	test->hard.function = buffers_free_hard;
	INIT_WORK(&test->work, buffers_free_work);
	kucomms_channel_set_priv(channel, test);
	if (!kucomms_priv(kucomms_channel_endpoint(channel)))
		cmpxchg(&buffers_other, NULL, channel);
	return 0;
}

static void buffers_close(struct kucomms_channel *channel)
{
	struct buffers_channel *test = kucomms_channel_priv(channel);

	hrtimer_cancel(&test->hard);
	cancel_work_sync(&test->work);
	cmpxchg(&buffers_other, channel, NULL);
	kvfree(test);
}

static const struct kucomms_endpoint_ops buffers_ops = {
	.size = sizeof(buffers_ops),
	.message = buffers_message,
	.buffers_available = buffers_available,
	.open = buffers_open,
	.close = buffers_close,
};

static struct kucomms_endpoint *buffers_endpoint, *buffers_in_place;

static int __init buffers_init(void)
{
	static const struct kucomms_endpoint_options in_place = {
		.size = sizeof(in_place),
		.flags = KUCOMMS_RX_IN_PLACE | KUCOMMS_THREAD_PER_CHANNEL | KUCOMMS_POOLS,
		.max_pool_bytes = U64_MAX,
	};
	static const struct kucomms_endpoint_options shared = {
		.size = sizeof(shared),
		.flags = KUCOMMS_POOLS,
		.max_pool_bytes = U64_MAX,
	};

	buffers_endpoint = kucomms_register("kucomms_buffers", &buffers_ops, &shared, NULL);
	if (IS_ERR(buffers_endpoint))
		return PTR_ERR(buffers_endpoint);
	buffers_in_place = kucomms_register("kucomms_buffers_in_place", &buffers_ops, &in_place,
					    &buffers_in_place);
	if (!IS_ERR(buffers_in_place))
		return 0;
	kucomms_unregister(buffers_endpoint);
	return PTR_ERR(buffers_in_place);
}

static void __exit buffers_exit(void)
{
	kucomms_unregister(buffers_in_place);
	kucomms_unregister(buffers_endpoint);
}

module_init(buffers_init);
module_exit(buffers_exit);

MODULE_LICENSE("GPL");
MODULE_AUTHOR("kucomms");
MODULE_DESCRIPTION("kucomms test module: exercises pools and buffers");
MODULE_VERSION("0.1.0");
