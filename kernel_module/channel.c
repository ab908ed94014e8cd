// SPDX-License-Identifier: GPL-2.0-only
/* A channel: its memory, its rings, and sending. Receiving is in runner.c. */

#include <linux/bitops.h>
#include <linux/hardirq.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "internal.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* ---- memory -------------------------------------------------------------- */

/* As many of @count pages as there are in the list, and the list. */
void kucomms_pages_free(struct page **pages, unsigned long count)
{
	unsigned long i;

	for (i = 0; pages && i < count && pages[i]; i++) {
		put_page(pages[i]);
		atomic_long_dec(&kucomms_alive.pages);
		cond_resched();
	}
	kvfree(pages);
}

/**
 * kucomms_has_room - can a program have this number of pages?
 * @count: the number of pages
 *
 * For all that is allocated for a program. One sixteenth of the machine's memory
 * stays available to the others; so the kernel has to kill nobody for these pages,
 * which it could not find by the program's size. Swap does not count: these pages
 * cannot go there. A check, not a reservation.
 */
bool kucomms_has_room(unsigned long count)
{
	return si_mem_available() >= (long)(count + totalram_pages() / 16);
}

/* A list for pages, empty. The user is told of what is missing, no log is. */
struct page **kucomms_pages_list(unsigned long count)
{
	if (!kucomms_has_room(count))
		return NULL;
	return kvcalloc(count, sizeof(struct page *), KUCOMMS_GFP_PAGES);
}

/*
 * Fill the list, one page after the other. Now and then look whether there is still
 * room for the rest: others may fill lists, too.
 */
int kucomms_pages_alloc(struct page **pages, unsigned long count)
{
	unsigned long i;

	for (i = 0; i < count; i++) {
		if (fatal_signal_pending(current))
			return -EINTR;
		if (!(i % 256) && !kucomms_has_room(count - i))
			return -ENOMEM;
		pages[i] = alloc_page(KUCOMMS_GFP_PAGES);
		if (!pages[i])
			return -ENOMEM;
		atomic_long_inc(&kucomms_alive.pages);
		cond_resched();
	}
	return 0;
}

/* Map one side for us, the data twice in a row. */
static void *map_side(struct page **pages, unsigned long count, pgprot_t prot)
{
	unsigned long data = count - KUCOMMS_CONTROL_PAGES;
	struct page **list;
	void *at;

	list = kvmalloc_array(count + data, sizeof(*list),
			      GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!list)
		return NULL;
	memcpy(list, pages, count * sizeof(*list));
	memcpy(list + count, pages + KUCOMMS_CONTROL_PAGES,
	       data * sizeof(*list));
	at = vmap(list, count + data, VM_MAP, prot);
	kvfree(list);
	return at;
}

static void fill_geometry(struct kucomms_geometry *geometry, u64 ring_size,
			  u64 features)
{
	geometry->magic = KUCOMMS_MAGIC;
	geometry->version = KUCOMMS_ABI_VERSION;
	geometry->side = 0;
	geometry->features = features;
	geometry->page_size = PAGE_SIZE;
	geometry->ring_size = ring_size;
	geometry->producer_offset = PAGE_SIZE;
	geometry->consumer_offset = 2 * PAGE_SIZE;
	geometry->data_offset = KUCOMMS_CONTROL_PAGES * PAGE_SIZE;
	geometry->frame_size = KUCOMMS_HEADER_SIZE;
}

static void channel_free(struct kucomms_channel *channel)
{
	vunmap(channel->at[0]);
	vunmap(channel->at[1]);
	kucomms_pages_free(channel->pages, 2 * channel->side_pages);
	kucomms_pools_free(channel);
	kfree(channel->held);
	kfree(channel->user);
	kfree(channel);
	atomic_dec(&kucomms_alive.channels);
}

static void channel_release_work(struct work_struct *work)
{
	struct kucomms_channel *channel =
		container_of(work, struct kucomms_channel, release);

	irq_work_sync(&channel->signal);
	kucomms_debugfs_remove(channel);
	channel_free(channel);
}

static void signal_work(struct irq_work *work);

/**
 * kucomms_channel_new - a channel with its memory, charged to the caller
 * @ring_size: of each ring, a power of two, at least a page
 * @features: in force
 *
 * Return: the channel, with one reference, or an error pointer.
 */
struct kucomms_channel *kucomms_channel_new(u64 ring_size, u64 features)
{
	struct kucomms_channel *channel;
	void *own, *peer;
	int err;

	channel = kzalloc(sizeof(*channel), GFP_KERNEL_ACCOUNT);
	if (!channel)
		return ERR_PTR(-ENOMEM);
	atomic_inc(&kucomms_alive.channels);
	kref_init(&channel->ref);
	raw_spin_lock_init(&channel->tx_lock);
	raw_spin_lock_init(&channel->runner_lock);
	INIT_LIST_HEAD(&channel->ready);
	INIT_LIST_HEAD(&channel->attached);
	INIT_LIST_HEAD(&channel->drained);
	init_waitqueue_head(&channel->wait);
	init_irq_work(&channel->signal, signal_work);
	INIT_WORK(&channel->release, channel_release_work);
	channel->number = -ENOENT;
	channel->ring_size = ring_size;
	channel->features = features;
	if (features & KUCOMMS_FEATURE_TURNS)	/* the user begins */
		channel->turn = KUCOMMS_TURN_THEIRS;
	channel->turn_at = U64_MAX;		/* of no message */
	channel->side_pages = KUCOMMS_CONTROL_PAGES + (ring_size >> PAGE_SHIFT);

	err = -ENOMEM;
	channel->pages = kucomms_pages_list(2 * channel->side_pages);
	if (!channel->pages)
		goto err_free;
	err = kucomms_pages_alloc(channel->pages, 2 * channel->side_pages);
	if (err)
		goto err_free;
	err = -ENOMEM;
	own = map_side(channel->pages, channel->side_pages, PAGE_KERNEL);
	if (!own)
		goto err_free;
	channel->at[0] = own;
	/* What the user owns we only ever read. */
	peer = map_side(channel->pages + channel->side_pages,
			channel->side_pages, PAGE_KERNEL_RO);
	if (!peer)
		goto err_free;
	channel->at[1] = peer;

	fill_geometry(own, ring_size, features);
	kucomms_ring_producer_init(&channel->tx, own + PAGE_SIZE,
				   peer + 2 * PAGE_SIZE,
				   own + KUCOMMS_CONTROL_PAGES * PAGE_SIZE,
				   ring_size);
	kucomms_ring_consumer_init(&channel->rx, own + 2 * PAGE_SIZE,
				   peer + PAGE_SIZE,
				   peer + KUCOMMS_CONTROL_PAGES * PAGE_SIZE,
				   ring_size);
	if (features & KUCOMMS_FEATURE_POOLS) {
		err = kucomms_pools_new(channel);
		if (err)
			goto err_free;
	}
	channel->tx_open = true;
	return channel;

err_free:
	channel_free(channel);
	return ERR_PTR(err);
}

static void channel_last_put(struct kref *ref)
{
	struct kucomms_channel *channel =
		container_of(ref, struct kucomms_channel, ref);

	/* The last reference may go in any context, unmapping may not. */
	queue_work(kucomms_workqueue, &channel->release);
}

/**
 * kucomms_channel_get - keep a channel beyond its close callback
 * @channel: the channel
 *
 * Any context. Return: @channel.
 */
struct kucomms_channel *kucomms_channel_get(struct kucomms_channel *channel)
{
	kref_get(&channel->ref);
	return channel;
}
EXPORT_SYMBOL_GPL(kucomms_channel_get);

/**
 * kucomms_channel_put - the opposite of kucomms_channel_get()
 * @channel: the channel
 *
 * Any context that may wake a task: not NMI, not under a scheduler's lock.
 */
void kucomms_channel_put(struct kucomms_channel *channel)
{
	kref_put(&channel->ref, channel_last_put);
}
EXPORT_SYMBOL_GPL(kucomms_channel_put);

/* ---- mapping into user space --------------------------------------------- */

static void channel_vm_open(struct vm_area_struct *vma)
{
	struct kucomms_channel *channel = vma->vm_private_data;

	atomic_inc(&channel->mappings);
}

static void channel_vm_close(struct vm_area_struct *vma)
{
	struct kucomms_channel *channel = vma->vm_private_data;

	if (atomic_dec_and_test(&channel->mappings))
		kucomms_channel_user_gone(channel);
}

static const struct vm_operations_struct channel_vm_ops = {
	.open = channel_vm_open,
	.close = channel_vm_close,
};

static void change_vm_flags(struct vm_area_struct *vma, vm_flags_t set,
			    vm_flags_t clear)
{
#ifdef KUCOMMS_HAS_VM_FLAGS_SET
	vm_flags_set(vma, set);
	vm_flags_clear(vma, clear);
#else
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
#endif
}

/* Map pages, all at once. @never: rights that the mapping is never to get. */
int kucomms_pages_map(struct vm_area_struct *vma, struct page **pages,
		      vm_flags_t never)
{
	unsigned long count = vma_pages(vma);

	change_vm_flags(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP, never);
	return vm_insert_pages(vma, vma->vm_start, pages, &count);
}

/**
 * kucomms_channel_mmap - map a part of one side
 * @channel: the channel
 * @vma: where, and which pages
 *
 * The file that is mapped holds the channel, so the pages live as long as the
 * mapping, whatever becomes of the endpoint.
 *
 * Return: 0, -EINVAL, -EACCES, -ESHUTDOWN, -ENOMEM.
 */
int kucomms_channel_mmap(struct kucomms_channel *channel,
			 struct vm_area_struct *vma)
{
	unsigned long first = vma->vm_pgoff, count = vma_pages(vma);
	unsigned long sides = 2 * channel->side_pages;
	vm_flags_t never = VM_MAYEXEC;
	int err;

	if (!(vma->vm_flags & VM_SHARED) || first >= sides ||
	    count > sides - first)
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EACCES;
	if (first < channel->side_pages) {
		if (count > channel->side_pages - first)
			return -EINVAL;
		if (vma->vm_flags & VM_WRITE)
			return -EACCES;
		never |= VM_MAYWRITE;
	}
	if (test_bit(KUCOMMS_USER_GONE, &channel->state))
		return -ESHUTDOWN;
	first = array_index_nospec(first, sides);
	err = kucomms_pages_map(vma, channel->pages + first, never);
	if (err)
		return err;
	vma->vm_private_data = channel;
	vma->vm_ops = &channel_vm_ops;
	channel_vm_open(vma);
	return 0;
}

/* The user is gone, or says so. While the channel is attached, that is counted. */
void kucomms_channel_lose_user(struct kucomms_channel *channel)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&channel->runner_lock, irq);
	/*
	 * A full barrier: what it sent is seen with its end. pairs with
	 * smp_rmb() in serve()
	 */
	if (!test_and_set_bit(KUCOMMS_USER_GONE, &channel->state) &&
	    channel->runner) {
		atomic_inc(&channel->device->ending);
		atomic_inc(&channel->user->ending);
	}
	raw_spin_unlock_irqrestore(&channel->runner_lock, irq);
}

/* The last descriptor or mapping went: what it sent is still delivered. */
void kucomms_channel_user_gone(struct kucomms_channel *channel)
{
	kucomms_channel_lose_user(channel);
	kucomms_channel_kick(channel);
}

/* ---- waking -------------------------------------------------------------- */

static void signal_now(struct kucomms_channel *channel)
{
	__poll_t events = EPOLLIN | EPOLLRDNORM | EPOLLOUT | EPOLLWRNORM;

	if (test_bit(KUCOMMS_HUNG_UP, &channel->state))
		events |= EPOLLHUP;
	wake_up_poll(&channel->wait, events);
	if (test_and_clear_bit(KUCOMMS_KICK, &channel->state))
		kucomms_channel_kick(channel);
}

static void signal_work(struct irq_work *work)
{
	signal_now(container_of(work, struct kucomms_channel, signal));
}

/* Wake the user, and with KUCOMMS_KICK the runner. Any context but NMI. */
void kucomms_channel_signal(struct kucomms_channel *channel)
{
	/* Who holds a lock of the scheduler cannot wake anybody. */
	if (in_interrupt() || irqs_disabled() ||
	    (IS_ENABLED(CONFIG_PREEMPT_RT) && !preemptible()))
		irq_work_queue(&channel->signal);
	else
		signal_now(channel);
}

/* Have the runner look, soon. Any context but NMI. */
void kucomms_channel_alert(struct kucomms_channel *channel)
{
	set_bit(KUCOMMS_KICK, &channel->state);
	kucomms_channel_signal(channel);
}

/* Ring the user's doorbell. */
static void ring_user(struct kucomms_channel *channel)
{
	atomic64_inc(&channel->doorbells_rung);
	trace_kucomms_wake(channel->serial);
	kucomms_channel_signal(channel);
}

/* The same, from any context: an irq_work does it. */
static void ring_user_later(struct kucomms_channel *channel)
{
	atomic64_inc(&channel->doorbells_rung);
	irq_work_queue(&channel->signal);
}

/* What poll() tells; see the ABI header. */
__poll_t kucomms_channel_events(struct kucomms_channel *channel)
{
	__poll_t events = 0;
	u64 parked;

	if (test_bit(KUCOMMS_HUNG_UP, &channel->state)) {
		events = EPOLLHUP | EPOLLIN | EPOLLRDNORM;
		if (test_bit(KUCOMMS_BROKEN, &channel->state))
			events |= EPOLLERR;
		return events;
	}
	parked = READ_ONCE(channel->tx.peer->parked);
	if (parked && parked == READ_ONCE(channel->tx.rung))
		events |= EPOLLIN | EPOLLRDNORM;
	parked = READ_ONCE(channel->rx.peer->parked);
	if (parked && parked == READ_ONCE(channel->rx.rung))
		events |= EPOLLOUT | EPOLLWRNORM;
	return events;
}

/* The user broke the rules: the runner shuts this channel, and nothing else. */
void kucomms_channel_broken(struct kucomms_channel *channel)
{
	if (test_and_set_bit(KUCOMMS_BROKEN, &channel->state))
		return;
	atomic64_inc(&kucomms_alive.protocol_errors);
	trace_kucomms_protocol_error(channel->serial);
	kucomms_channel_alert(channel);
}

/* The same, from any context. */
static void break_later(struct kucomms_channel *channel)
{
	if (test_and_set_bit(KUCOMMS_BROKEN, &channel->state))
		return;
	atomic64_inc(&kucomms_alive.protocol_errors);
	set_bit(KUCOMMS_KICK, &channel->state);
	irq_work_queue(&channel->signal);
}

/* ---- turns --------------------------------------------------------------- */

/*
 * With turns, who sends passes the turn to the user, and the next message of the
 * user brings it back, just before its callback. A sender takes the turn from us
 * with the lock, or as the only one; the runner brings it. Each writes only where
 * it has found the other's last word, as in user space: see channel.h there.
 */
static void set_turn(struct kucomms_channel *channel, u32 turn)
{
	if (READ_ONCE(channel->turn) != KUCOMMS_TURN_ANY)
		WRITE_ONCE(channel->turn, turn);
}

/**
 * kucomms_has_turn - may the kernel send on this channel?
 * @channel: the channel
 *
 * With KUCOMMS_TURNS: from the message callback of what the user has sent until
 * something is sent; without, always. Any context but NMI.
 */
bool kucomms_has_turn(struct kucomms_channel *channel)
{
	return READ_ONCE(channel->turn) != KUCOMMS_TURN_THEIRS;
}
EXPORT_SYMBOL_GPL(kucomms_has_turn);

/**
 * kucomms_channel_take_turn - a message is handed out, and the turn with it
 * @channel: the channel; the caller is its runner
 *
 * Once for each message, however often that is handed out, see kucomms_retry():
 * who has sent something and gets the same message again must not send twice.
 */
void kucomms_channel_take_turn(struct kucomms_channel *channel)
{
	if (READ_ONCE(channel->turn) == KUCOMMS_TURN_ANY ||
	    channel->rx.position == channel->turn_at)
		return;
	channel->turn_at = channel->rx.position;
	set_turn(channel, KUCOMMS_TURN_OURS);
}

/**
 * kucomms_channel_check_turn - may the user have sent this?
 * @channel: the channel; the caller is its runner
 * @view: what was found at the front
 *
 * Return: 0 or -EPROTO.
 */
int kucomms_channel_check_turn(const struct kucomms_channel *channel,
			       const struct kucomms_view *view)
{
	/*
	 * Read after the message: when that answers what was sent elsewhere, then
	 * the turn that was taken for it is seen, too.
	 */
	u32 turn = READ_ONCE(channel->turn);

	if (view->flags & KUCOMMS_FLAG_TOKEN &&
	    (turn == KUCOMMS_TURN_ANY || view->length ||
	     view->flags != KUCOMMS_FLAG_TOKEN))
		return -EPROTO;
	if (turn == KUCOMMS_TURN_OURS &&
	    channel->rx.position != channel->turn_at &&
	    !(view->flags & KUCOMMS_FLAG_NOTICE))
		return -EPROTO;		/* it has sent twice */
	return 0;
}

/* ---- sending ------------------------------------------------------------- */

static int why_closed(const struct kucomms_channel *channel)
{
	return test_bit(KUCOMMS_BROKEN, &channel->state) ? -EPROTO : -ESHUTDOWN;
}

/* Why the user takes and gives nothing any more, or 0. Any context. */
int kucomms_channel_user_error(const struct kucomms_channel *channel)
{
	return test_bit(KUCOMMS_USER_GONE, &channel->state) ?
		       why_closed(channel) : 0;
}

/* Why nothing can be sent, or 0. As the only sender, or with the lock held. */
static int closed(struct kucomms_channel *channel)
{
	return channel->tx_open ? kucomms_channel_user_error(channel) :
				  why_closed(channel);
}

/* A message of @length goes to the user, and the turn with it. */
static void count_sent(struct kucomms_channel *channel, u32 length)
{
	channel->messages_sent++;
	channel->bytes_sent += length;
	/* Before it is seen: the answer brings the turn back. */
	set_turn(channel, KUCOMMS_TURN_THEIRS);
}

/*
 * Room for the next message, in @frame. The caller is the only sender, or has the
 * lock, and has found that nothing is owed.
 */
static int take_room(struct kucomms_channel *channel, u32 length,
		     struct kucomms_frame **frame)
{
	u64 span = kucomms_frame_span(length);
	int err = kucomms_ring_next(&channel->tx, length, frame);

	/* Ask for the doorbell: with it the writable callback is called. */
	if (err == -EAGAIN && kucomms_ring_park_for_space(&channel->tx, span))
		err = kucomms_ring_next(&channel->tx, length, frame);
	return err;
}

/* May a message be sent now? As the only sender, or with the lock held. */
static int may_send(struct kucomms_channel *channel)
{
	int err = closed(channel);

	if (!err && !kucomms_has_turn(channel))
		err = -EPERM;
	return err;
}

/* A message of @length found no room: the writable callback will be called. */
static void note_full(struct kucomms_channel *channel, u32 length)
{
	u64 span = kucomms_frame_span(length);

	channel->full++;
	/* Not forgotten when a smaller one fits meanwhile. */
	WRITE_ONCE(channel->short_of, min(channel->short_of ?: span, span));
}

/* Where the next message goes. The caller is the only sender, or has the lock. */
static int next_frame(struct kucomms_channel *channel, u32 length,
		      struct kucomms_frame **frame)
{
	int err = may_send(channel);

	if (err)
		return err;
	/* What is given back, and news of pools, go first. */
	if (kucomms_owes(channel))
		err = kucomms_pay(channel);
	/* The runner, which was kicked for it, goes on with that. */
	if (err == -EINPROGRESS)
		err = -EAGAIN;
	if (!err)
		err = take_room(channel, length, frame);
	if (err == -EAGAIN)
		note_full(channel, length);
	return err;
}

/* As next_frame(), and hold it: -ENOBUFS when too many are held. */
static int reserve(struct kucomms_channel *channel, u32 length,
		   struct kucomms_frame **frame)
{
	int err = next_frame(channel, length, frame);

	if (!err && !kucomms_ring_can_hold(&channel->tx))
		err = -ENOBUFS;
	if (!err) {
		count_sent(channel, length);
		kucomms_ring_hold(&channel->tx, *frame, length);
	}
	return err;
}

/*
 * As kucomms_ring_wake_consumer(), for any number of senders: what was rung for
 * never goes back, or poll() would miss it.
 */
static bool must_ring(struct kucomms_channel *channel)
{
	u64 epoch, rung;

	/*
	 * pairs with smp_mb() in kucomms_ring_park_for_data()
	 * model: senders.pml WITHOUT_MUST_RING_MB
	 */
	smp_mb();
	epoch = READ_ONCE(channel->tx.peer->parked);
	rung = READ_ONCE(channel->tx.rung);
	while ((s64)(epoch - rung) > 0)
		if (try_cmpxchg(&channel->tx.rung, &rung, epoch))
			return true;
	return false;
}

/*
 * After a reserve, and the commit if it was one. Also when it was not to be: what
 * was owed may have been sent before it.
 */
static int sent(struct kucomms_channel *channel, int err)
{
	if (err == -EPROTO)
		kucomms_channel_broken(channel);
	else if (err != -ESHUTDOWN && must_ring(channel))
		ring_user(channel);
	return err;
}

/* Bytes in front of the data: the list of the buffers that are handed over. */
static u32 list_size(const struct kucomms_message *message)
{
	return message->buffer_count * sizeof(struct kucomms_carried);
}

/* Write all of a message but its control word and the list of its buffers. */
static void fill(struct kucomms_frame *frame,
		 const struct kucomms_message *message)
{
	frame->type = message->type;
	frame->id = message->id;
	frame->user_value = message->user_value;
	memcpy((void *)(frame + 1) + list_size(message), message->data,
	       message->length);
}

/*
 * Where the message goes, its buffers handed over; the caller is the only one to
 * send, or has the lock, and goes on to publish it or to hold it: that cannot fail.
 */
static int begin(struct kucomms_channel *channel,
		 const struct kucomms_message *message,
		 struct kucomms_frame **frame)
{
	int err = next_frame(channel, list_size(message) + message->length,
			     frame);

	if (!err && message->buffer_count)
		err = kucomms_hand_over(message, (void *)(*frame + 1));
	if (err)
		return err;
	count_sent(channel, message->length);
	return 0;
}

/* Fill in a frame that was begun, and publish it. */
static void publish(struct kucomms_channel *channel,
		    struct kucomms_frame *frame,
		    const struct kucomms_message *message, u32 flags)
{
	fill(frame, message);
	kucomms_ring_publish(&channel->tx, frame,
			     list_size(message) + message->length, flags,
			     kucomms_frame_kind(message->buffer_count));
}

/* As the only one to send, or with the lock held. */
static int put(struct kucomms_channel *channel,
	       const struct kucomms_message *message, u32 flags)
{
	struct kucomms_frame *frame;
	int err = begin(channel, message, &frame);

	if (!err)
		publish(channel, frame, message, flags);
	return err;
}

static int put_short(struct kucomms_channel *channel,
		     const struct kucomms_message *message, u32 flags)
{
	unsigned long irq;
	int err;

	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	err = put(channel, message, flags);
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	return err;
}

/* Hold a frame, to be filled in without the lock, which is held now. */
static int begin_copy(struct kucomms_channel *channel,
		      const struct kucomms_message *message,
		      struct kucomms_frame **frame)
{
	u32 length = list_size(message) + message->length;
	int err;

	if (!kucomms_ring_can_hold(&channel->tx)) {
		/* When one of those that copy just now has ended. */
		note_full(channel, length);
		WRITE_ONCE(channel->crowded, true);
		return -EAGAIN;
	}
	err = begin(channel, message, frame);
	if (!err) {
		kucomms_ring_hold(&channel->tx, *frame, length);
		atomic_inc(&channel->copying);
	}
	return err;
}

/* The runner is told when it waits for this, or when a sender does. */
static void end_copy(struct kucomms_channel *channel)
{
	/*
	 * A full barrier: pairs with smp_mb() in kucomms_channel_stop_sending().
	 * Who stops the senders finds that none copies, or is found here.
	 */
	bool last = atomic_dec_and_test(&channel->copying);

	if ((last && !READ_ONCE(channel->tx_open)) ||
	    (READ_ONCE(channel->crowded) && xchg(&channel->crowded, false)))
		kucomms_channel_alert(channel);
}

/* A long copy does not keep interrupts and other senders waiting. */
static int put_long(struct kucomms_channel *channel,
		    const struct kucomms_message *message, u32 flags)
{
	struct kucomms_frame *frame;
	unsigned long irq;
	int err;

	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	err = begin_copy(channel, message, &frame);
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	if (err)
		return err;
	fill(frame, message);
	kucomms_ring_finish(frame, list_size(message) + message->length, flags,
			    kucomms_frame_kind(message->buffer_count));
	end_copy(channel);
	return 0;
}

/* Of the flags of a message, what a module can send. */
static u32 flags_of(const struct kucomms_message *message)
{
	return message->flags & (KUCOMMS_FLAG_REPLY | KUCOMMS_FLAG_TOKEN);
}

/* A token is alone, on a channel with turns. */
static bool token_fits(const struct kucomms_channel *channel,
		       const struct kucomms_message *message, u32 flags)
{
	return !(flags & KUCOMMS_FLAG_TOKEN) ||
	       (flags == KUCOMMS_FLAG_TOKEN && !message->length &&
		!message->buffer_count &&
		channel->features & KUCOMMS_FEATURE_TURNS);
}

static int send_message(struct kucomms_channel *channel,
			const struct kucomms_message *message, u32 flags,
			bool locked)
{
	int err;

	if (!token_fits(channel, message, flags))
		return -EINVAL;
	if (message->buffer_count) {
		err = kucomms_buffers_claim(channel, message);
		if (err)
			return err;
	}
	if (!locked)
		err = put(channel, message, flags);
	else if (message->length > KUCOMMS_PUT_MAX)
		err = put_long(channel, message, flags);
	else
		err = put_short(channel, message, flags);
	if (err && message->buffer_count)
		kucomms_buffers_unclaim(message, message->buffer_count);
	trace_kucomms_send(channel->serial, message->type, message->id,
			   message->length, err);
	return sent(channel, err);
}

/**
 * kucomms_send - send a message
 * @channel: to whom
 * @message: what; copied. Of its flags only KUCOMMS_FLAG_REPLY counts, and
 *	     KUCOMMS_FLAG_TOKEN, see kucomms_pass_turn(). Its buffers are handed
 *	     over: after 0 they are the user's, and not to be touched; after an
 *	     error they are what they were
 *
 * Any context but NMI; may be mixed freely with every other way to send but
 * kucomms_send_unlocked().
 *
 * Return: 0, -EAGAIN when the ring is full (the writable callback is called when
 * there is room again), -EMSGSIZE when it can never fit, -ESHUTDOWN when the
 * channel is closed, -EPROTO when the user broke the rules, -EPERM when it is the
 * user's turn; -EINVAL for a token with data or buffers, as a reply, or without
 * turns, and when one of the buffers is not the caller's to send, is of another
 * channel or there twice, -EOPNOTSUPP when the user knows no buffers, -ESTALE when
 * one is of a pool that was closed.
 */
int kucomms_send(struct kucomms_channel *channel,
		 const struct kucomms_message *message)
{
	return send_message(channel, message, flags_of(message), true);
}
EXPORT_SYMBOL_GPL(kucomms_send);

/**
 * kucomms_try_send - send from code that may have interrupted a send
 * @channel: to whom
 * @message: as for kucomms_send(), without buffers, at most 2048 bytes
 *
 * For probes, tracing callbacks and NMI handlers: it waits for no lock, wakes
 * nobody itself (an irq_work does, a moment later), and fires no tracepoint. Any
 * context.
 *
 * Return: as kucomms_send(), and -EBUSY when somebody sends on the channel just
 * now, which may be the code that was interrupted, or when buffers that the user is
 * to get back go first: try again later, or drop it; -EMSGSIZE also for more than
 * 2048 bytes, -EINVAL for buffers.
 */
int kucomms_try_send(struct kucomms_channel *channel,
		     const struct kucomms_message *message)
{
	u32 flags = flags_of(message);
	struct kucomms_frame *frame;
	unsigned long irq;
	int err;

	if (message->buffer_count || !token_fits(channel, message, flags))
		return -EINVAL;
	if (message->length > KUCOMMS_PUT_MAX)
		return -EMSGSIZE;
	if (!raw_spin_trylock_irqsave(&channel->tx_lock, irq))
		return -EBUSY;
	err = may_send(channel);
	if (!err && kucomms_owes(channel))
		err = -EBUSY;
	if (!err)
		err = take_room(channel, message->length, &frame);
	if (err == -EAGAIN)
		note_full(channel, message->length);
	if (!err) {
		count_sent(channel, message->length);
		publish(channel, frame, message, flags);
	}
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	if (err == -EPROTO)
		break_later(channel);
	else if (err != -ESHUTDOWN && must_ring(channel))
		ring_user_later(channel);
	return err;
}
EXPORT_SYMBOL_GPL(kucomms_try_send);

/**
 * kucomms_send_unlocked - send a message, as the only sender of the channel
 * @channel: to whom
 * @message: as for kucomms_send()
 *
 * From the channel's callbacks only, which the endpoint's thread calls: it looks
 * after the sender's state too. Nobody else may send on the channel in any way.
 * Return as kucomms_send().
 */
int kucomms_send_unlocked(struct kucomms_channel *channel,
			  const struct kucomms_message *message)
{
	return send_message(channel, message, flags_of(message), false);
}
EXPORT_SYMBOL_GPL(kucomms_send_unlocked);

/**
 * kucomms_pass_turn - have the user send, with nothing to tell him
 * @channel: a channel with turns
 *
 * The user gets an empty message with KUCOMMS_FLAG_TOKEN. Context and return as
 * kucomms_send().
 */
int kucomms_pass_turn(struct kucomms_channel *channel)
{
	static const struct kucomms_message token;

	return send_message(channel, &token, KUCOMMS_FLAG_TOKEN, true);
}
EXPORT_SYMBOL_GPL(kucomms_pass_turn);

/**
 * kucomms_reply - answer a request
 * @channel: where it came from
 * @request: the message that the user sent; its type and id are the reply's
 * @data: of the reply
 * @length: of @data
 *
 * Context and return as kucomms_send().
 */
int kucomms_reply(struct kucomms_channel *channel,
		  const struct kucomms_message *request,
		  const void *data, u32 length)
{
	struct kucomms_message reply = {
		.type = request->type,
		.id = request->id,
		.length = length,
		.data = (void *)data,
	};

	return send_message(channel, &reply, KUCOMMS_FLAG_REPLY, true);
}
EXPORT_SYMBOL_GPL(kucomms_reply);

/**
 * kucomms_reserve - begin a message that is written in place
 * @channel: to whom
 * @length: of its data
 *
 * The message is to be filled in and given to kucomms_commit() or
 * kucomms_discard(), in any order with others; up to 64 may be out. Its length
 * is fixed. The user sees nothing that comes after it before that. With turns it
 * takes the turn, and kucomms_discard() gives it back.
 *
 * No other message gets its bytes before it is committed or discarded, even if
 * the user claims to have read them.
 *
 * Any context but NMI. Return: the message, or an error pointer: as
 * kucomms_send(), and -ENOBUFS when too many are out.
 */
struct kucomms_message *kucomms_reserve(struct kucomms_channel *channel,
					u32 length)
{
	struct kucomms_frame *frame;
	struct kucomms_loan *loan = NULL;
	unsigned long irq, out, slot;
	int err = -ENOBUFS;

	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	/* pairs with clear_bit_unlock() in end_loan() */
	out = smp_load_acquire(&channel->loans_out);
	if (out != ~0UL) {
		err = reserve(channel, length, &frame);
		if (!err) {
			slot = ffz(out);
			/* Atomic: end_loan() clears without the lock. */
			set_bit(slot, &channel->loans_out);
			loan = &channel->loans[slot];
		}
	}
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	if (!loan) {
		sent(channel, err);
		return ERR_PTR(err);
	}
	loan->frame = frame;
	loan->length = length;
	loan->message = (struct kucomms_message) {
		.length = length,
		.data = frame + 1,
	};
	return &loan->message;
}
EXPORT_SYMBOL_GPL(kucomms_reserve);

/* Is this a loan that is out? */
static bool is_out(struct kucomms_channel *channel,
		   const struct kucomms_loan *loan)
{
	unsigned long slot = loan - channel->loans;

	return slot < KUCOMMS_LOAN_LIMIT && test_bit(slot, &channel->loans_out);
}

static void end_loan(struct kucomms_channel *channel,
		     struct kucomms_loan *loan)
{
	/* Who takes the slot next finds us done with it. */
	clear_bit_unlock(loan - channel->loans, &channel->loans_out);
	sent(channel, 0);
}

/* Write into a frame what the module has put into its message. */
static void take_header(struct kucomms_loan *loan)
{
	loan->frame->type = loan->message.type;
	loan->frame->id = loan->message.id;
	loan->frame->user_value = loan->message.user_value;
}

/**
 * kucomms_commit - send a message that was written in place
 * @channel: to whom
 * @message: from kucomms_reserve(); not to be used any more. Of its flags only
 *	     KUCOMMS_FLAG_REPLY counts
 *
 * Any context but NMI. Return: 0; -ESHUTDOWN or -EPROTO when the channel was closed
 * meanwhile, and the message is dropped; -EINVAL when it is not out: it was committed
 * or discarded before.
 */
int kucomms_commit(struct kucomms_channel *channel,
		   struct kucomms_message *message)
{
	struct kucomms_loan *loan =
		container_of(message, struct kucomms_loan, message);

	if (!is_out(channel, loan))
		return -EINVAL;
	take_header(loan);
	trace_kucomms_send(channel->serial, message->type, message->id,
			   loan->length, 0);
	kucomms_ring_commit(loan->frame, loan->length,
			    message->flags & KUCOMMS_FLAG_REPLY);
	end_loan(channel, loan);
	/*
	 * After the barrier in must_ring(), which pairs with smp_mb() in
	 * kucomms_channel_stop_sending(): if sending goes on, the user finds
	 * the message before the end.
	 */
	return READ_ONCE(channel->tx_open) ?
		       kucomms_channel_user_error(channel) :
		       why_closed(channel);
}
EXPORT_SYMBOL_GPL(kucomms_commit);

/**
 * kucomms_discard - drop a message that was to be written in place
 * @channel: to whom
 * @message: from kucomms_reserve(); not to be used any more
 *
 * Any context but NMI. Return: 0, -EINVAL when it is not out: it was committed or
 * discarded before.
 */
int kucomms_discard(struct kucomms_channel *channel,
		    struct kucomms_message *message)
{
	struct kucomms_loan *loan =
		container_of(message, struct kucomms_loan, message);
	unsigned long irq;

	if (!is_out(channel, loan))
		return -EINVAL;
	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	channel->messages_sent--;
	channel->bytes_sent -= loan->length;
	set_turn(channel, KUCOMMS_TURN_OURS);
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	kucomms_ring_discard(loan->frame, loan->length);
	end_loan(channel, loan);
	return 0;
}
EXPORT_SYMBOL_GPL(kucomms_discard);

/**
 * kucomms_reserve_unlocked - begin a message in place, as the only sender
 * @channel: to whom
 * @length: of its data
 *
 * As kucomms_reserve(), under the conditions of kucomms_send_unlocked(), one at
 * a time: the message is to be filled in and given to kucomms_commit_unlocked() in
 * the same callback, before anything else is sent on the channel. Or it is
 * forgotten: nothing has been taken for it.
 *
 * Return: the message, or an error pointer as kucomms_send().
 */
struct kucomms_message *
kucomms_reserve_unlocked(struct kucomms_channel *channel, u32 length)
{
	struct kucomms_loan *loan = &channel->loans[0];
	int err;

	err = next_frame(channel, length, &loan->frame);
	if (err)
		return ERR_PTR(sent(channel, err));
	loan->position = channel->tx.position;
	loan->length = length;
	loan->message = (struct kucomms_message) {
		.length = length,
		.data = loan->frame + 1,
	};
	return &loan->message;
}
EXPORT_SYMBOL_GPL(kucomms_reserve_unlocked);

/**
 * kucomms_commit_unlocked - send what kucomms_reserve_unlocked() has begun
 * @channel: to whom
 * @message: from there; not to be used any more
 *
 * From the callback that has reserved it. Between two callbacks the endpoint's
 * thread itself may send, buffers that go back to the user for instance.
 *
 * Return: 0, or an error, and nothing was sent: -ESTALE when something else was
 * sent on the channel since it was reserved, -ESHUTDOWN or -EPROTO when the channel
 * was closed, -EPERM when the turn has gone.
 */
int kucomms_commit_unlocked(struct kucomms_channel *channel,
			    struct kucomms_message *message)
{
	struct kucomms_loan *loan =
		container_of(message, struct kucomms_loan, message);
	int err = may_send(channel);

	/* Its place is that of the next frame, or another message is there. */
	if (!err && loan->position != channel->tx.position)
		err = -ESTALE;
	if (err)
		return err;
	take_header(loan);
	count_sent(channel, loan->length);
	kucomms_ring_publish(&channel->tx, loan->frame, loan->length,
			     message->flags & KUCOMMS_FLAG_REPLY,
			     KUCOMMS_KIND_MESSAGE);
	trace_kucomms_send(channel->serial, message->type, message->id,
			   loan->length, 0);
	return sent(channel, 0);
}
EXPORT_SYMBOL_GPL(kucomms_commit_unlocked);

/**
 * kucomms_channel_stop_sending - no more sends from now on
 * @channel: the channel; the caller is its runner
 *
 * Return: whether those that had begun have ended. If not, the last of them alerts
 * the runner, which is to call this again before the user sees the end.
 */
bool kucomms_channel_stop_sending(struct kucomms_channel *channel)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	WRITE_ONCE(channel->tx_open, false);
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	/*
	 * pairs with atomic_dec_and_test() in end_copy(), and with the barrier in
	 * kucomms_commit()
	 */
	smp_mb();
	/* What they wrote is seen before the end: pairs as above. */
	return !atomic_read_acquire(&channel->copying);
}

/*
 * Send what is owed to the user, as far as there is room. Return: whether nothing
 * is owed any more; else the doorbell was asked for.
 */
bool kucomms_channel_pay(struct kucomms_channel *channel)
{
	unsigned long irq;
	int err;

	while (kucomms_owes(channel)) {
		raw_spin_lock_irqsave(&channel->tx_lock, irq);
		err = closed(channel);
		if (!err)
			err = kucomms_pay(channel);
		raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
		sent(channel, err == -EINPROGRESS ? 0 : err);
		if (err && err != -EINPROGRESS)
			return false;
		cond_resched();
	}
	return true;
}

/*
 * Somebody has met a full ring: is there room now? If not, go on asking for the
 * doorbell.
 */
bool kucomms_channel_room(struct kucomms_channel *channel)
{
	unsigned long irq;
	bool room = false;

	if (!READ_ONCE(channel->short_of))
		return false;
	raw_spin_lock_irqsave(&channel->tx_lock, irq);
	if (channel->short_of && channel->tx_open)
		room = kucomms_ring_park_for_space(&channel->tx,
						   channel->short_of);
	if (room)
		WRITE_ONCE(channel->short_of, 0);
	raw_spin_unlock_irqrestore(&channel->tx_lock, irq);
	if (!room)
		sent(channel, -EAGAIN);
	return room;
}

/* ---- what modules ask ---------------------------------------------------- */

/**
 * kucomms_tx_avail - bytes that were sent and the user has not released yet
 * @channel: the channel
 *
 * Any context but NMI. Headers are included, as in the three that follow.
 */
u64 kucomms_tx_avail(struct kucomms_channel *channel)
{
	/* From our page, and not tx.position, which the lock is for. */
	u64 waiting = READ_ONCE(channel->tx.own->position) -
		      READ_ONCE(channel->tx.peer->position);

	/* The user may write any number there. */
	return min(waiting, channel->ring_size);
}
EXPORT_SYMBOL_GPL(kucomms_tx_avail);

/**
 * kucomms_tx_free - bytes that can be sent now
 * @channel: the channel
 */
u64 kucomms_tx_free(struct kucomms_channel *channel)
{
	return channel->ring_size - kucomms_tx_avail(channel);
}
EXPORT_SYMBOL_GPL(kucomms_tx_free);

/**
 * kucomms_rx_avail - bytes that the user has sent and no callback has taken yet
 * @channel: the channel
 */
u64 kucomms_rx_avail(struct kucomms_channel *channel)
{
	u64 waiting = READ_ONCE(channel->rx.peer->position) -
		      READ_ONCE(channel->rx.position);

	/* The user may write any number there. */
	return min(waiting, channel->ring_size);
}
EXPORT_SYMBOL_GPL(kucomms_rx_avail);

/**
 * kucomms_rx_free - bytes that the user can send before the ring is full
 * @channel: the channel
 *
 * What is held, see kucomms_hold(), is neither free nor avail.
 */
u64 kucomms_rx_free(struct kucomms_channel *channel)
{
	u64 used = READ_ONCE(channel->rx.peer->position) -
		   READ_ONCE(channel->rx.own->position);

	/* The user may write any number there. */
	return channel->ring_size - min(used, channel->ring_size);
}
EXPORT_SYMBOL_GPL(kucomms_rx_free);

/**
 * kucomms_channel_endpoint - whose channel it is
 * @channel: the channel, before its close callback has returned
 */
struct kucomms_endpoint *
kucomms_channel_endpoint(struct kucomms_channel *channel)
{
	return channel->endpoint;
}
EXPORT_SYMBOL_GPL(kucomms_channel_endpoint);

/**
 * kucomms_channel_number - which of the numbered channels it is
 * @channel: the channel, from its open callback on
 *
 * Return: the number, or -ENOENT when its endpoint does not number them.
 */
int kucomms_channel_number(struct kucomms_channel *channel)
{
	return channel->number;
}
EXPORT_SYMBOL_GPL(kucomms_channel_number);

/**
 * kucomms_channel_priv - what the module has put there
 * @channel: the channel
 */
void *kucomms_channel_priv(struct kucomms_channel *channel)
{
	return channel->priv;
}
EXPORT_SYMBOL_GPL(kucomms_channel_priv);

/**
 * kucomms_channel_set_priv - put something there
 * @channel: the channel
 * @priv: whatever the module likes; NULL at first
 */
void kucomms_channel_set_priv(struct kucomms_channel *channel, void *priv)
{
	channel->priv = priv;
}
EXPORT_SYMBOL_GPL(kucomms_channel_set_priv);

/**
 * kucomms_retry - leave this message where it is, for later
 * @channel: the channel
 *
 * To be called from the message callback, which then gets the same message
 * again: as soon as there is room after a send to this channel has met -EAGAIN, or
 * buffers have come back after kucomms_allocate() has met -ENOBUFS, or after
 * kucomms_resume(), or when the user is gone. No other message of the
 * channel comes meanwhile, and when its ring is full, the user waits. A hostile
 * user may have changed the message by then. With turns it brings the turn when it
 * is handed out first, and not again.
 *
 * What a user gives back comes through the ring, too. One that has filled it with
 * messages while the first of them waits for a buffer can give nothing back, and
 * both wait for ever. So retry for a buffer only if your users leave room in their
 * ring for that; else answer with an error.
 */
void kucomms_retry(struct kucomms_channel *channel)
{
	set_bit(KUCOMMS_STAYS, &channel->state);
	set_bit(KUCOMMS_RETRY, &channel->state);
}
EXPORT_SYMBOL_GPL(kucomms_retry);

/**
 * kucomms_resume - hand out the message for which kucomms_retry() was called
 * @channel: the channel
 *
 * Any context but NMI.
 */
void kucomms_resume(struct kucomms_channel *channel)
{
	/* Also when it comes before the retry itself. */
	set_bit(KUCOMMS_RESUMED, &channel->state);
	clear_bit(KUCOMMS_RETRY, &channel->state);
	kucomms_channel_alert(channel);
}
EXPORT_SYMBOL_GPL(kucomms_resume);

/**
 * kucomms_close - close a channel in order
 * @channel: the channel
 *
 * The user receives what was sent before, then the end. The close callback
 * comes soon, in its thread. Any context but NMI.
 */
void kucomms_close(struct kucomms_channel *channel)
{
	set_bit(KUCOMMS_CLOSE_WANTED, &channel->state);
	kucomms_channel_alert(channel);
}
EXPORT_SYMBOL_GPL(kucomms_close);
