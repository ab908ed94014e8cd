// SPDX-License-Identifier: GPL-2.0-only
/*
 * The thread that calls an endpoint's callbacks: it drains the rings of its
 * channels, ticks, and sleeps without waking when it has nothing to do.
 */

#include <linux/hrtimer.h>
#include <linux/kthread.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/sched/stat.h>
#include <linux/slab.h>

#include "internal.h"
#include "trace.h"

#define WORK_PERIOD	(NSEC_PER_SEC / 100)
#define TIMER_PERIOD	NSEC_PER_SEC
#define POLL_MOST	64	/* channels polled at once; more are parked */

/* ---- who has to be looked at --------------------------------------------- */

/* Put a channel on the list of those to look at. runner_lock is held. */
static void make_ready(struct kucomms_runner *runner,
		       struct kucomms_channel *channel)
{
	raw_spin_lock(&runner->lock);
	if (list_empty(&channel->ready))
		list_add_tail(&channel->ready, &runner->ready);
	raw_spin_unlock(&runner->lock);
}

/* Have the runner look at this channel. Wakes, so not under scheduler locks. */
void kucomms_channel_kick(struct kucomms_channel *channel)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&channel->runner_lock, irq);
	if (channel->runner) {
		make_ready(channel->runner, channel);
		wake_up_process(channel->runner->task);
	}
	raw_spin_unlock_irqrestore(&channel->runner_lock, irq);
}

/* The first channel of a list to look at, or NULL. */
static struct kucomms_channel *next_of(struct kucomms_runner *runner,
				       struct list_head *list)
{
	struct kucomms_channel *channel;
	unsigned long irq;

	raw_spin_lock_irqsave(&runner->lock, irq);
	channel = list_first_entry_or_null(list, struct kucomms_channel, ready);
	if (channel)
		list_del_init(&channel->ready);
	raw_spin_unlock_irqrestore(&runner->lock, irq);
	return channel;
}

/* ---- the end of a channel ------------------------------------------------ */

/* It is not to be polled, nor parked after polling. */
static void undrain(struct kucomms_runner *runner,
		    struct kucomms_channel *channel)
{
	if (list_empty(&channel->drained))
		return;
	list_del_init(&channel->drained);
	runner->drained_count--;
}

/* The runner knows this channel no more. */
static void detach(struct kucomms_runner *runner,
		   struct kucomms_channel *channel)
{
	unsigned long irq;
	bool ending;

	raw_spin_lock_irqsave(&channel->runner_lock, irq);
	channel->runner = NULL;
	ending = test_bit(KUCOMMS_USER_GONE, &channel->state);
	raw_spin_lock(&runner->lock);
	list_del_init(&channel->ready);
	raw_spin_unlock(&runner->lock);
	raw_spin_unlock_irqrestore(&channel->runner_lock, irq);
	list_del_init(&channel->attached);
	undrain(runner, channel);
	kucomms_endpoint_detach(channel, ending);
	if (runner != runner->endpoint->shared)
		runner->finished = true;
	kucomms_channel_put(channel);
}

/* Nothing more comes: tell the user why, and wake it for good. */
static void hang_up(struct kucomms_channel *channel, u32 state)
{
	if (state != KUCOMMS_STATE_OPEN)
		kucomms_ring_set_state(&channel->tx, state);
	/* Who sees the end must see why. */
	smp_mb__before_atomic();
	set_bit(KUCOMMS_HUNG_UP, &channel->state);
	kucomms_channel_signal(channel);
}

static void call_close(struct kucomms_runner *runner,
		       struct kucomms_channel *channel)
{
	struct kucomms_endpoint *endpoint = runner->endpoint;

	if (!test_bit(KUCOMMS_OPENED, &channel->state))
		return;
	if (endpoint->ops->close)
		endpoint->ops->close(channel);
	atomic_dec(&endpoint->opened);
}

/*
 * End one channel. @state: what the user is told, OPEN for nothing. While a send is
 * under way nothing happens: it alerts us when it is over, and we come here again.
 */
static void end_channel(struct kucomms_runner *runner,
			struct kucomms_channel *channel, u32 state)
{
	if (!kucomms_channel_stop_sending(channel))
		return;
	hang_up(channel, state);
	call_close(runner, channel);
	detach(runner, channel);
}

/* Tell the process that has asked for a channel what came of it. */
static void answer(struct kucomms_channel *channel,
		   struct kucomms_device *device, int err)
{
	channel->open_result = err;
	/* pairs with smp_load_acquire() in is_answered() */
	smp_store_release(&channel->answered, true);
	wake_up_all(&channel->wait);
	wake_up_poll(&device->wait, EPOLLPRI);
}

/* No channel comes of it. The process is told when nothing is left of it. */
static void refuse(struct kucomms_runner *runner,
		   struct kucomms_channel *channel, int err)
{
	struct kucomms_device *device = channel->device;

	kucomms_channel_get(channel);
	kucomms_channel_stop_sending(channel);
	/* Nobody removes the device until the process is told. */
	mutex_lock(&kucomms_lock);
	detach(runner, channel);
	answer(channel, device, err);
	mutex_unlock(&kucomms_lock);
	kucomms_channel_put(channel);
}

/* Sleep until no send on the channel is under way. */
static void wait_for_senders(struct kucomms_channel *channel)
{
	for (;;) {
		/* Before the look: the last sender wakes us after it. */
		set_current_state(TASK_IDLE);
		if (kucomms_channel_stop_sending(channel))
			break;
		schedule();
	}
	__set_current_state(TASK_RUNNING);
}

/* The endpoint goes: no channel is left after this. */
static void shut(struct kucomms_runner *runner)
{
	struct kucomms_channel *channel, *next;

	/* Those that have only asked. */
	while ((channel = next_of(runner, &runner->ready)))
		if (list_empty(&channel->attached))
			refuse(runner, channel, -ESHUTDOWN);
	if (list_empty(&runner->channels))
		return;
	list_for_each_entry(channel, &runner->channels, attached)
		kucomms_channel_stop_sending(channel);
	list_for_each_entry(channel, &runner->channels, attached) {
		wait_for_senders(channel);
		hang_up(channel, KUCOMMS_STATE_SHUTDOWN);
	}
	list_for_each_entry_safe(channel, next, &runner->channels, attached) {
		call_close(runner, channel);
		detach(runner, channel);
	}
}

/* ---- callbacks ----------------------------------------------------------- */

/* Make the buffer large enough for this channel. Not while the thread uses it. */
int kucomms_runner_grow(struct kucomms_runner *runner,
			struct kucomms_channel *channel, gfp_t gfp)
{
	size_t size = channel->ring_size - KUCOMMS_HEADER_SIZE;
	void *buffer;

	if (size <= runner->buffer_size)
		return 0;
	if (!kucomms_has_room(size >> PAGE_SHIFT))
		return -ENOMEM;
	buffer = kvmalloc(size, gfp | __GFP_NOWARN | __GFP_RETRY_MAYFAIL);
	if (!buffer)
		return -ENOMEM;
	kvfree(runner->buffer);
	runner->buffer = buffer;
	runner->buffer_size = size;
	return 0;
}

/*
 * Ask the endpoint whether it takes this channel, and have a buffer for what the
 * user sends. Return: 0, -ENOMEM, or what the endpoint says.
 */
static int ask_endpoint(struct kucomms_runner *runner,
			struct kucomms_channel *channel)
{
	struct kucomms_endpoint *endpoint = runner->endpoint;
	const struct kucomms_peer peer = {
		.pid = channel->pid,
		.uid = channel->uid,
		.hello_length = channel->hello_length,
		.hello = channel->hello,
	};
	int err = 0;

	if (endpoint->ops->open)
		err = endpoint->ops->open(channel, &peer);
	/* What is no errno, or means to the user that there is no answer yet. */
	if (err > 0 || err <= -ERESTARTSYS || err == -EINTR ||
	    err == -EAGAIN || err == -EINPROGRESS)
		err = -EIO;
	if (err || (endpoint->options.flags & KUCOMMS_RX_IN_PLACE))
		return err;
	err = kucomms_runner_grow(runner, channel, GFP_KERNEL);
	if (err && endpoint->ops->close)
		endpoint->ops->close(channel);
	return err;
}

/* A process waits for its channel to be opened. */
static void open_channel(struct kucomms_runner *runner,
			 struct kucomms_channel *channel)
{
	struct kucomms_endpoint *endpoint = runner->endpoint;
	int err = ask_endpoint(runner, channel);

	if (err) {
		refuse(runner, channel, err);
		return;
	}
	if (list_empty(&runner->channels)) {
		runner->next_work = ktime_add_ns(ktime_get(), WORK_PERIOD);
		runner->next_timer = ktime_add_ns(ktime_get(), TIMER_PERIOD);
	}
	set_bit(KUCOMMS_OPENED, &channel->state);
	list_add_tail(&channel->attached, &runner->channels);
	atomic_inc(&endpoint->opened);
	wake_up_all(&endpoint->wait);
	/* To be looked at, and parked, once. */
	kucomms_channel_kick(channel);
	answer(channel, channel->device, 0);
}

/* ---- messages that are held ---------------------------------------------- */

/*
 * The pins are the runner's, as the consumer is. So who lets go, anywhere, only
 * marks a bit and kicks; and to hold nothing costs a load now and then.
 *
 * Unpin what was let go. Return: whether there was anything.
 */
static bool unpin(struct kucomms_channel *channel)
{
	unsigned long done, slot;

	if (!atomic_long_read(&channel->let_go))
		return false;
	/* pairs with atomic_long_fetch_or() in kucomms_let_go() */
	done = atomic_long_xchg(&channel->let_go, 0) & channel->held_now;
	for_each_set_bit(slot, &done, KUCOMMS_HOLD_LIMIT)
		kucomms_pin_remove(&channel->held[slot].pin);
	channel->held_now &= ~done;
	return done;
}

/**
 * kucomms_hold - keep a message in place beyond its callback
 * @channel: where it came from, of an endpoint with KUCOMMS_RX_IN_PLACE
 * @message: what the message callback was given, which this is called from
 *
 * Its buffers are not held: take those that you want to keep.
 *
 * Several may be held, 64 at most, and let go in any order. Their bytes, and those
 * of all that came after the oldest of them, are no room for the user meanwhile.
 *
 * When the channel ends they stay readable until the close callback has returned,
 * and longer with kucomms_channel_get(); letting go is still fine, until that is
 * put, but not needed.
 *
 * Return: the message, to be given to kucomms_let_go(), or an error pointer:
 * -ENOBUFS when too many are held, -EINVAL when it is no message in place, or not
 * the one of the callback.
 */
struct kucomms_message *kucomms_hold(struct kucomms_channel *channel,
				     const struct kucomms_message *message)
{
	struct kucomms_held *held;
	unsigned long slot;

	if (!channel->held || message != channel->in_hand)
		return ERR_PTR(-EINVAL);
	unpin(channel);
	if (channel->held_now == ~0UL)
		return ERR_PTR(-ENOBUFS);
	slot = ffz(channel->held_now);
	channel->held_now |= BIT(slot);
	held = &channel->held[slot];
	held->message = *message;
	held->message.buffers = NULL;
	held->message.buffer_count = 0;
	kucomms_pin_add(&channel->rx.pins, &held->pin, channel->rx.position);
	return &held->message;
}
EXPORT_SYMBOL_GPL(kucomms_hold);

/**
 * kucomms_let_go - a message that was held is not needed any more
 * @channel: where it came from
 * @message: from kucomms_hold(); not to be used any more
 *
 * Any context but NMI.
 */
void kucomms_let_go(struct kucomms_channel *channel,
		    struct kucomms_message *message)
{
	struct kucomms_held *held =
		container_of(message, struct kucomms_held, message);
	long bit = BIT(held - channel->held);

	/*
	 * What was read is read before the user may write there. pairs with
	 * atomic_long_xchg() in unpin(). Who finds another bit, finds that the
	 * runner was kicked for it and has not looked yet.
	 */
	if (atomic_long_fetch_or(bit, &channel->let_go))
		return;
	set_bit(KUCOMMS_KICK, &channel->state);
	kucomms_channel_signal(channel);
}
EXPORT_SYMBOL_GPL(kucomms_let_go);

/* ---- receiving ----------------------------------------------------------- */

/*
 * What is no plain message. Return: 0 when it is a message with buffers, which are
 * in @message now; 1 when it was a notice; -EPROTO.
 */
static int take_buffers(struct kucomms_channel *channel,
			const struct kucomms_view *view,
			struct kucomms_message *message)
{
	struct kucomms_pools *pools = channel->pools;
	u32 list = view->buffers * sizeof(struct kucomms_carried);
	int err;

	if (view->flags & KUCOMMS_FLAG_NOTICE) {
		/* Unless it was taken while a message before it stayed. */
		if ((s64)(pools->ahead - channel->rx.position) <= 0 &&
		    kucomms_buffers_returned(channel, view))
			return -EPROTO;
		return 1;
	}
	err = kucomms_buffers_received(channel, view);
	message->buffers = pools->hand;
	message->buffer_count = pools->hand_count;
	message->data += list;
	message->length -= list;
	return err;
}

/*
 * Hand one message to the endpoint, and go on to the next if it took it. Return: 0,
 * -EPROTO.
 */
static int deliver(struct kucomms_runner *runner,
		   struct kucomms_channel *channel,
		   const struct kucomms_view *view)
{
	struct kucomms_message message = {
		.type = view->type,
		.id = view->id,
		.user_value = view->user_value,
		.length = view->length,
		.flags = view->flags,
		.data = (void *)view->data,
	};
	int err = 0;

	if (view->kind == KUCOMMS_KIND_BUFFER)
		err = take_buffers(channel, view, &message);
	else if (channel->pools && channel->pools->hand_count)
		err = -EPROTO; /* It had buffers when the callback left it. */
	if (err < 0)
		return err;
	if (err) {
		kucomms_ring_advance(&channel->rx, view);
		return 0;
	}
	if (!(runner->endpoint->options.flags & KUCOMMS_RX_IN_PLACE)) {
		/* The user can change the ring under our eyes, not this. */
		memcpy(runner->buffer, message.data, message.length);
		message.data = runner->buffer;
	}
	clear_bit(KUCOMMS_STAYS, &channel->state);
	clear_bit(KUCOMMS_RESUMED, &channel->state);
	channel->in_hand = &message;
	kucomms_channel_take_turn(channel);
	kucomms_callback_begins(channel);
	runner->endpoint->ops->message(channel, &message);
	/* Buffers are looked at after the batch. */
	kucomms_callback_ended(channel);
	channel->in_hand = NULL;
	/* Not KUCOMMS_RETRY: kucomms_resume() may have come before this. */
	if (test_and_clear_bit(KUCOMMS_STAYS, &channel->state)) {
		if (test_and_clear_bit(KUCOMMS_RESUMED, &channel->state))
			clear_bit(KUCOMMS_RETRY, &channel->state);
		if (message.buffer_count)
			kucomms_buffers_stay(channel);
		return 0;
	}
	if (message.buffer_count)
		kucomms_buffers_done(channel);
	channel->messages_received++;
	channel->bytes_received += message.length;
	trace_kucomms_receive(channel->serial, view->type, view->id,
			      message.length, 0);
	kucomms_ring_advance(&channel->rx, view);
	return 0;
}

/* Give space back; ring when the user waits for it, late while it @goes_on. */
static void release(struct kucomms_channel *channel, bool goes_on)
{
	int must_ring;

	if (goes_on) {
		must_ring = kucomms_ring_release_lazily(&channel->rx);
	} else {
		kucomms_ring_give_back(&channel->rx);
		must_ring = kucomms_ring_wake_producer(&channel->rx);
	}
	if (must_ring != 1)
		return;
	atomic64_inc(&channel->doorbells_rung);
	trace_kucomms_wake(channel->serial);
	kucomms_channel_signal(channel);
}

/*
 * Messages, at most a batch; what is skipped in one look counts as one. Return:
 * -EAGAIN drained, 0 not yet, -EPROTO.
 */
static int drain(struct kucomms_runner *runner,
		 struct kucomms_channel *channel)
{
	u64 most = channel->ring_size / 4, before = channel->rx.position;
	const u64 begin = before;
	struct kucomms_view view;
	int err = 0, count;

	for (count = 0; count < KUCOMMS_BATCH; count++) {
		if (test_bit(KUCOMMS_RETRY, &channel->state) ||
		    test_bit(KUCOMMS_CLOSE_WANTED, &channel->state))
			break;
		err = kucomms_ring_peek(&channel->rx, &view);
		if (!err)
			err = kucomms_channel_check_turn(channel, &view);
		if (err < 0)
			break;
		err = err == KUCOMMS_SKIPPED ? 0 :
					       deliver(runner, channel, &view);
		if (err)
			break;
		if (channel->rx.position - before >= most) {
			release(channel, true);
			before = channel->rx.position;
		}
		if (channel->rx.position - begin >= KUCOMMS_BATCH_BYTES)
			break;
		cond_resched();
	}
	/* It goes on at once, but when drained, in error, or told to wait. */
	release(channel, !err && !test_bit(KUCOMMS_RETRY, &channel->state) &&
		!test_bit(KUCOMMS_CLOSE_WANTED, &channel->state));
	return err;
}

/* Have the runner look at its channel once more. */
static void look_again(struct kucomms_runner *runner,
		       struct kucomms_channel *channel)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&channel->runner_lock, irq);
	make_ready(runner, channel);
	raw_spin_unlock_irqrestore(&channel->runner_lock, irq);
}

static void call_work(struct kucomms_runner *runner,
		      struct kucomms_channel *channel)
{
	bool again;

	kucomms_callback_begins(channel);
	again = runner->endpoint->ops->work(channel);
	if (again)
		set_bit(KUCOMMS_WORK_AGAIN, &channel->state);
	if (kucomms_callback_ended(channel) || again)
		look_again(runner, channel);
}

/* Tell the module that there is @what again: room in the ring, or buffers. */
static void tell_module(struct kucomms_runner *runner,
			struct kucomms_channel *channel,
			void (*what)(struct kucomms_channel *channel))
{
	/* What is left for later may be tried again. */
	clear_bit(KUCOMMS_RETRY, &channel->state);
	if (!what)
		return;
	kucomms_callback_begins(channel);
	what(channel);
	if (kucomms_callback_ended(channel))
		look_again(runner, channel);
}

/*
 * A message stays when the module has no buffer, and what the user gives back
 * comes behind it: take that. Return: -EAGAIN all seen, 0 not yet, -EPROTO.
 */
static int look_ahead(struct kucomms_channel *channel)
{
	struct kucomms_ring_consumer ahead = channel->rx;
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_view view;
	int err = 0, count;

	/* A list with a head in it is not to be copied; nothing is pinned here. */
	kucomms_pins_init(&ahead.pins);
	if ((s64)(pools->ahead - ahead.position) > 0)
		ahead.position = pools->ahead;
	for (count = 0; count < KUCOMMS_BATCH && !err; count++) {
		err = kucomms_ring_peek(&ahead, &view);
		if (err < 0)
			break;
		if (err == KUCOMMS_SKIPPED) {
			err = 0;
			continue;
		}
		if (view.flags & KUCOMMS_FLAG_NOTICE)
			err = kucomms_buffers_returned(channel, &view);
		kucomms_ring_advance(&ahead, &view);
	}
	pools->ahead = ahead.position;
	/* Once more, or have the user ring for what comes next. */
	if (err == -EAGAIN && kucomms_ring_park_for_data(&ahead))
		err = 0;
	channel->rx.parked = ahead.parked;
	/* The next look begins at pools->ahead: what was seen up to there stays seen. */
	channel->rx.available = ahead.available;
	channel->rx.all_seen = ahead.all_seen;
	return err;
}

/* Were buffers missing, and are there some now? Then the module tries again. */
static bool try_again(struct kucomms_runner *runner,
		      struct kucomms_channel *channel)
{
	if (!kucomms_buffers_came_back(channel))
		return false;
	tell_module(runner, channel, runner->endpoint->ops->buffers_available);
	return true;
}

/* The message at the front stays. Return: whether there is more to do. */
static bool wait_for_retry(struct kucomms_runner *runner,
			   struct kucomms_channel *channel)
{
	int err;

	if (!channel->pools || !atomic_read(&channel->pools->is_short))
		return false;
	err = look_ahead(channel);
	if (err == -EPROTO) {
		kucomms_channel_broken(channel);
		return true;
	}
	return try_again(runner, channel) || !err;
}

/* Messages may have brought buffers, and taken some: what follows of that. */
static void after_buffers(struct kucomms_runner *runner,
			  struct kucomms_channel *channel)
{
	kucomms_pools_sweep(channel);
	try_again(runner, channel);
	if (!kucomms_owes(channel) || !kucomms_channel_pay(channel))
		return;
	/* A send that met what was owed is to be told of the room that is left. */
	if (READ_ONCE(channel->short_of))
		look_again(runner, channel);
}

/* Look at one channel. Return: whether there is more to do. */
static bool serve(struct kucomms_runner *runner,
		  struct kucomms_channel *channel)
{
	u32 state;
	int err;

	undrain(runner, channel);
	if (test_bit(KUCOMMS_BROKEN, &channel->state)) {
		end_channel(runner, channel, KUCOMMS_STATE_OPEN);
		return false;
	}
	if (test_bit(KUCOMMS_CLOSE_WANTED, &channel->state)) {
		end_channel(runner, channel, KUCOMMS_STATE_CLOSED);
		return false;
	}
	if (test_and_clear_bit(KUCOMMS_WORK_AGAIN, &channel->state))
		call_work(runner, channel);
	kucomms_pools_sweep(channel);
	if (kucomms_channel_pay(channel) && kucomms_channel_room(channel))
		tell_module(runner, channel, runner->endpoint->ops->writable);
	/* First whether more can come, then what has come. */
	state = kucomms_ring_peer_state(&channel->rx);
	if (state != KUCOMMS_STATE_OPEN)
		kucomms_channel_lose_user(channel);
	if (test_bit(KUCOMMS_USER_GONE, &channel->state)) {
		/* pairs with test_and_set_bit() in kucomms_channel_lose_user() */
		smp_rmb();
		channel->rx.final = 1;
		/* There will never be room: the next send says so. */
		clear_bit(KUCOMMS_RETRY, &channel->state);
	}
	if (unpin(channel))
		release(channel, false);
	if (test_bit(KUCOMMS_RETRY, &channel->state))
		return wait_for_retry(runner, channel);
	err = state > KUCOMMS_STATE_SHUTDOWN ? -EPROTO : drain(runner, channel);
	if (err == -EPROTO) {
		kucomms_channel_broken(channel);
		return true;
	}
	if (channel->pools)
		after_buffers(runner, channel);
	if (err != -EAGAIN)
		return !test_bit(KUCOMMS_RETRY, &channel->state) ||
		       wait_for_retry(runner, channel);
	if (channel->rx.final) {
		end_channel(runner, channel, KUCOMMS_STATE_OPEN);
		return false;
	}
	if (runner->poll_budget && runner->drained_count < POLL_MOST) {
		list_add_tail(&channel->drained, &runner->drained);
		runner->drained_count++;
		return false;
	}
	return kucomms_ring_park_for_data(&channel->rx);
}

/* ---- ticks --------------------------------------------------------------- */

/*
 * How many periods have ended at @deadline and since: all but the last of them
 * are missed. The deadline moves to the next one that is to come.
 */
static u64 due(ktime_t *deadline, u64 period, ktime_t now)
{
	u64 count;

	if (ktime_before(now, *deadline))
		return 0;
	count = 1 + div64_u64(ktime_to_ns(ktime_sub(now, *deadline)), period);
	*deadline = ktime_add_ns(*deadline, period * count);
	return count;
}

static void run_ticks(struct kucomms_runner *runner)
{
	const struct kucomms_endpoint_ops *ops = runner->endpoint->ops;
	struct kucomms_channel *channel;
	ktime_t now;
	u64 count;

	if (list_empty(&runner->channels) || (!ops->work && !ops->timer))
		return;
	now = ktime_get();
	count = due(&runner->next_work, WORK_PERIOD, now);
	if (count && ops->work) {
		list_for_each_entry(channel, &runner->channels, attached) {
			channel->ticks_missed += count - 1;
			call_work(runner, channel);
			cond_resched();
		}
	}
	count = due(&runner->next_timer, TIMER_PERIOD, now);
	if (count && ops->timer) {
		list_for_each_entry(channel, &runner->channels, attached) {
			channel->ticks_missed += count - 1;
			ops->timer(channel, ktime_get_ns());
			cond_resched();
		}
	}
}

/* ---- the thread ---------------------------------------------------------- */

static bool any_ready(struct kucomms_runner *runner)
{
	unsigned long irq;
	bool any;

	raw_spin_lock_irqsave(&runner->lock, irq);
	any = !list_empty(&runner->ready);
	raw_spin_unlock_irqrestore(&runner->lock, irq);
	return any;
}

/* Look at every channel that is ready now, once. Return: whether any is again. */
static bool serve_all(struct kucomms_runner *runner)
{
	struct kucomms_channel *channel;
	unsigned long irq;
	LIST_HEAD(round);

	raw_spin_lock_irqsave(&runner->lock, irq);
	list_splice_init(&runner->ready, &round);
	raw_spin_unlock_irqrestore(&runner->lock, irq);
	while (!kthread_should_stop() && !READ_ONCE(runner->shut)) {
		channel = next_of(runner, &round);
		if (!channel)
			break;
		if (list_empty(&channel->attached))
			open_channel(runner, channel);
		else if (serve(runner, channel))
			look_again(runner, channel);
		run_ticks(runner);
		cond_resched();
	}
	/* What was not looked at, because the runner has to stop. */
	raw_spin_lock_irqsave(&runner->lock, irq);
	list_splice(&round, &runner->ready);
	raw_spin_unlock_irqrestore(&runner->lock, irq);
	return any_ready(runner);
}

/* When a tick is due, or never. */
static ktime_t next_tick(struct kucomms_runner *runner)
{
	const struct kucomms_endpoint_ops *ops = runner->endpoint->ops;
	ktime_t deadline = KTIME_MAX;

	if (list_empty(&runner->channels))
		return deadline;
	if (ops->work)
		deadline = runner->next_work;
	if (ops->timer)
		deadline = min_t(ktime_t, deadline, runner->next_timer);
	return deadline;
}

/* ---- polling before sleeping --------------------------------------------- */

/*
 * The rule of KVM's halt polling: the budget grows when polling finds something
 * or would have found it, and shrinks to nothing when not.
 */
#define POLL_FIRST	(50 * NSEC_PER_USEC)	/* a peer wakes up in so long */
#define POLL_LEAST	(20 * NSEC_PER_USEC)	/* less is not worth it */
#define POLL_REST	16			/* sleeps after polls in vain */

static void poll_grow(struct kucomms_runner *runner)
{
	runner->poll_budget = min(max_t(u64, 2 * runner->poll_budget,
					POLL_FIRST),
				  runner->endpoint->options.busy_poll_ns);
}

static void poll_shrink(struct kucomms_runner *runner)
{
	runner->poll_budget /= 2;
	if (runner->poll_budget < POLL_LEAST)
		runner->poll_budget = 0;
}

static bool poll_once(struct kucomms_runner *runner)
{
	struct kucomms_channel *channel;

	list_for_each_entry(channel, &runner->drained, drained)
		if (kucomms_ring_has_front(&channel->rx))
			return true;
	return false;
}

/*
 * Does another task want this processor? It may be the one to send. A kernel with
 * lazy preemption does not say so by need_resched() before the next tick.
 */
static bool is_wanted_elsewhere(void)
{
	return need_resched() || !single_task_running();
}

/* Spin for the channels that were drained. Whether something came. */
static bool poll_drained(struct kucomms_runner *runner)
{
	ktime_t begin = ktime_get(), now = begin, end;
	struct kucomms_channel *channel;
	bool hit = false, ends = false;
	unsigned int i;

	end = min_t(ktime_t, next_tick(runner),
		    ktime_add_ns(begin, runner->poll_budget));
	while (!hit && !ends && ktime_before(now, end)) {
		for (i = 0; i < 32 && !hit; i++) {
			hit = poll_once(runner);
			cpu_relax();
		}
		ends = is_wanted_elsewhere() || any_ready(runner) ||
		       kthread_should_stop() || READ_ONCE(runner->shut);
		now = ktime_get();
	}
	list_for_each_entry(channel, &runner->drained, drained) {
		if (hit)
			channel->polls_hit++;
		else
			channel->polls_missed++;
		channel->poll_ns += ktime_to_ns(ktime_sub(now, begin));
	}
	if (hit) {
		poll_grow(runner);
	} else if (!ends || is_wanted_elsewhere()) {
		poll_shrink(runner);
		if (!runner->poll_budget)
			runner->poll_rest = POLL_REST;
	}
	return hit;
}

/* Look at all that were drained again, or park them. Whether any is ready. */
static bool end_drained(struct kucomms_runner *runner, bool hit)
{
	struct kucomms_channel *channel, *next;

	list_for_each_entry_safe(channel, next, &runner->drained, drained) {
		undrain(runner, channel);
		if (hit || kucomms_ring_park_for_data(&channel->rx))
			look_again(runner, channel);
	}
	return any_ready(runner);
}

static void runner_sleep(struct kucomms_runner *runner)
{
	u64 limit = runner->endpoint->options.busy_poll_ns;
	ktime_t deadline = next_tick(runner);
	ktime_t begin = 0;

	if (limit)
		begin = ktime_get();
	set_current_state(TASK_IDLE);
	if (!any_ready(runner) && !kthread_should_stop() &&
	    (!READ_ONCE(runner->shut) || runner->finished))
		schedule_hrtimeout_range(deadline == KTIME_MAX ? NULL : &deadline,
					 0, HRTIMER_MODE_ABS);
	__set_current_state(TASK_RUNNING);
	if (!limit || !any_ready(runner))
		return;
	if (ktime_us_delta(ktime_get(), begin) * NSEC_PER_USEC >
	    (s64)(limit + POLL_FIRST))
		poll_shrink(runner);
	else if (runner->poll_rest)
		runner->poll_rest--;
	else
		poll_grow(runner);
}

static int runner_main(void *data)
{
	struct kucomms_runner *runner = data;
	bool reaping = false, more;

	complete(&runner->started);
	while (!kthread_should_stop()) {
		if (READ_ONCE(runner->shut))
			shut(runner);
		more = serve_all(runner);
		/* Before it sleeps: nothing would wake it any more. */
		if (runner->finished && !reaping) {
			reaping = true;
			queue_work(kucomms_workqueue, &runner->reap);
		}
		/* Who is not polled has to be parked, or nobody hears of it. */
		if (!list_empty(&runner->drained))
			more |= end_drained(runner,
					    !more && poll_drained(runner));
		if (!more || runner->finished)
			runner_sleep(runner);
		run_ticks(runner);
		cond_resched();
	}
	shut(runner);
	return 0;
}

/* Whether we are in a callback of this endpoint. */
bool kucomms_runner_is_current(struct kucomms_endpoint *endpoint)
{
	struct kucomms_runner *runner;

	if (!(current->flags & PF_KTHREAD) ||
	    kthread_func(current) != runner_main)
		return false;
	runner = kthread_data(current);
	return runner->endpoint == endpoint;
}

static void reap_runner(struct work_struct *work)
{
	struct kucomms_runner *runner =
		container_of(work, struct kucomms_runner, reap);
	struct kucomms_endpoint *endpoint = runner->endpoint;

	kthread_stop(runner->task);
	mutex_lock(&kucomms_lock);
	list_del(&runner->list);
	kucomms_runner_free(runner);
	/* Under the lock: the thread that waits for this frees the endpoint next. */
	wake_up_all(&endpoint->wait);
	mutex_unlock(&kucomms_lock);
}

/* Free a runner whose thread has ended. */
void kucomms_runner_free(struct kucomms_runner *runner)
{
	put_task_struct(runner->task);
	kvfree(runner->buffer);
	kfree(runner);
	atomic_dec(&kucomms_alive.runners);
}

/* End a thread that serves nobody, and free the runner. */
void kucomms_runner_stop(struct kucomms_runner *runner)
{
	kthread_stop(runner->task);
	kucomms_runner_free(runner);
}

/**
 * kucomms_runner_new - make a thread; what we need for it is charged to the caller
 * @name: of the thread
 *
 * To follow: kucomms_runner_start(), or kucomms_runner_stop() when it is not to
 * be. Return: the runner or an error pointer.
 */
struct kucomms_runner *kucomms_runner_new(const char *name)
{
	struct kucomms_runner *runner;
	struct task_struct *task;

	runner = kzalloc(sizeof(*runner), GFP_KERNEL_ACCOUNT);
	if (!runner)
		return ERR_PTR(-ENOMEM);
	INIT_LIST_HEAD(&runner->list);
	raw_spin_lock_init(&runner->lock);
	INIT_LIST_HEAD(&runner->ready);
	INIT_LIST_HEAD(&runner->channels);
	INIT_LIST_HEAD(&runner->drained);
	init_completion(&runner->started);
	INIT_WORK(&runner->reap, reap_runner);
	task = kthread_create(runner_main, runner, "%s", name);
	if (IS_ERR(task)) {
		kfree(runner);
		return ERR_CAST(task);
	}
	runner->task = get_task_struct(task);
	atomic_inc(&kucomms_alive.runners);
	return runner;
}

/* Let it call the callbacks of this endpoint. Does not sleep. */
void kucomms_runner_start(struct kucomms_runner *runner,
			  struct kucomms_endpoint *endpoint)
{
	runner->endpoint = endpoint;
	wake_up_process(runner->task);
}

/* Have a new channel opened and served. Takes a reference. */
void kucomms_runner_attach(struct kucomms_runner *runner,
			   struct kucomms_channel *channel)
{
	kucomms_channel_get(channel);
	raw_spin_lock_irq(&channel->runner_lock);
	channel->runner = runner;
	make_ready(runner, channel);
	wake_up_process(runner->task);
	raw_spin_unlock_irq(&channel->runner_lock);
}
