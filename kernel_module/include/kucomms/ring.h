/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * THE ring: one direction of a channel. One source for the kernel module, the
 * Python extension and C programs; it knows neither a lock nor a system call.
 *
 *	producer page     consumer page     data, mapped twice in a row
 *	+----------+      +----------+      +---------------+---------------+
 *	| position |      | position |      | frame | frame | frame | fra ...
 *	| parked   |      | parked   |      +---------------+---------------+
 *	| wanted   |      +----------+        a frame that crosses the end goes
 *	| state    |                          on in the second mapping
 *	+----------+
 *
 *	            released        committed   busy          reserved
 *	   free   |  (consumer   |  frames    | frame ...   |   free
 *	----------+---position---+------------+-------------+-----------> bytes
 *	          consumer       next to      the consumer  producer
 *	          ->position     read         stops here    ->position
 *
 * Ordering. Every access to a word that the other side writes, and its partner:
 *
 *	producer				consumer
 *	hold(): write busy header
 *	hold(): release producer position    -> refresh(): acquire
 *	write data
 *	commit(): release frame control      -> peek(): acquire
 *						read data
 *	refresh(): acquire                   <- give_back(): release consumer pos.
 *	commit() of one sender: release      -> refresh() of another: acquire
 *
 * or, for what is written before it is shown:
 *
 *	write header and data
 *	publish(): release producer position -> refresh(): acquire
 *						read header and data
 *
 * Parking. Each side looks again after saying that it sleeps, the other looks
 * whether it sleeps after changing something; a full barrier between the two
 * halves of each, so that at least one sees the other:
 *
 *	commit() or publish(): release		park(): advance epoch "parked"
 *	must_wake(): smp_mb		<-->	park(): smp_mb
 *	must_wake(): read epoch			park(): peek again
 *
 * and the same for space. The epoch says more than a flag: whoever wakes
 * remembers for which epoch it has rung, so a burst rings once.
 *
 * A producer that sleeps for space says in "wanted" for how much, and rings as
 * after a commit: a consumer that keeps pins and waits for something itself
 * learns so that nothing more can come (producer_starves()).
 *
 * Proof. Each barrier names a model in tests/models and what leaves it out there:
 * then the model fails.
 *
 * Space. What the consumer has released is free to be written again, but never a
 * frame that is reserved and not committed, nor one behind it, whatever the
 * consumer says: see kucomms_ring_refresh_consumed(). "held" knows those frames.
 *
 * Trust. The other side may write anything at any time into its pages. Each of
 * its words is read once, checked against what is kept privately, then used.
 *
 * Threads. A consumer belongs to one thread. Of the producer, next() to move(),
 * park() and the pins want the caller's lock; commit() and discard() do not: they
 * change nothing but the frame, and the next look at the consumer finds that.
 */
#ifndef _KUCOMMS_RING_H
#define _KUCOMMS_RING_H

#include <asm/barrier.h>
#include <linux/errno.h>
#include <linux/kucomms.h>

#define KUCOMMS_STATIC_ASSERT(name, condition) \
	extern char kucomms_assert_##name[(condition) ? 1 : -1]

KUCOMMS_STATIC_ASSERT(frame_size, sizeof(struct kucomms_frame) == 32);
KUCOMMS_STATIC_ASSERT(frame_type,
		      __builtin_offsetof(struct kucomms_frame, type) == 8);
KUCOMMS_STATIC_ASSERT(frame_id,
		      __builtin_offsetof(struct kucomms_frame, id) == 16);
KUCOMMS_STATIC_ASSERT(frame_user_value,
		      __builtin_offsetof(struct kucomms_frame, user_value) == 24);
KUCOMMS_STATIC_ASSERT(producer_size, sizeof(struct kucomms_producer) == 264);
KUCOMMS_STATIC_ASSERT(producer_parked,
		      __builtin_offsetof(struct kucomms_producer, parked) == 128);
KUCOMMS_STATIC_ASSERT(producer_wanted,
		      __builtin_offsetof(struct kucomms_producer, wanted) == 136);
KUCOMMS_STATIC_ASSERT(producer_state,
		      __builtin_offsetof(struct kucomms_producer, state) == 256);
KUCOMMS_STATIC_ASSERT(consumer_size, sizeof(struct kucomms_consumer) == 144);
KUCOMMS_STATIC_ASSERT(consumer_parked,
		      __builtin_offsetof(struct kucomms_consumer, parked) == 128);
KUCOMMS_STATIC_ASSERT(carried_size, sizeof(struct kucomms_carried) == 16);
KUCOMMS_STATIC_ASSERT(pool_news_size, sizeof(struct kucomms_pool_news) == 24);
KUCOMMS_STATIC_ASSERT(geometry_size, sizeof(struct kucomms_geometry) == 128);

#define KUCOMMS_HEADER_SIZE	((__u64)sizeof(struct kucomms_frame))

/* The bits that a message without buffers can have in its control word. */
#define KUCOMMS_PLAIN	((__u64)(KUCOMMS_FLAG_BUSY | KUCOMMS_FLAG_DISCARD | \
				 KUCOMMS_FLAG_REPLY) << 32 | 0xffffffffU)

/* One look passes at most this number of frames that are no messages, then says so. */
#define KUCOMMS_SKIP_MOST	256
#define KUCOMMS_SKIPPED		1

/* A producer can hold at most this number of frames that are not committed. */
#define KUCOMMS_HELD_MOST	128

/**
 * struct kucomms_pin - a frame in use, whose bytes must not be given back
 * @prev: towards older pins
 * @next: towards newer pins
 * @position: of the frame
 *
 * Pins of a ring are listed by position: they are made in that order.
 */
struct kucomms_pin {
	struct kucomms_pin *prev;
	struct kucomms_pin *next;
	__u64 position;
};

/**
 * struct kucomms_ring_producer - the producer's private half of a ring
 * @own: our page
 * @peer: the consumer's page, read-only here
 * @data: the data, mapped twice in a row
 * @size: of the data, a power of two
 * @position: bytes ever reserved
 * @consumed: the consumer's position as last seen
 * @parked: our epoch
 * @wanted: the bytes that we sleep for, 0 when awake
 * @rung: the last of the consumer's epochs for which we rang
 * @held: positions of frames that were held, the oldest first. Some of them may
 *	  have been committed since; a frame before the oldest of them has been
 * @held_count: of @held
 * @pins: loans that are out, or were dropped while a view of them lives
 * @high_water: most bytes seen waiting
 */
struct kucomms_ring_producer {
	struct kucomms_producer *own;
	const struct kucomms_consumer *peer;
	unsigned char *data;
	__u64 size;
	__u64 position;
	__u64 consumed;
	__u64 parked;
	__u64 wanted;
	__u64 rung;
	__u64 held[KUCOMMS_HELD_MOST];
	unsigned int held_count;
	struct kucomms_pin pins;
	__u64 high_water;
};

/**
 * struct kucomms_ring_consumer - the consumer's private half of a ring
 * @own: our page
 * @peer: the producer's page, read-only here
 * @data: the data, mapped twice in a row
 * @size: of the data, a power of two
 * @position: the next byte to read
 * @published: the position last told to the producer
 * @available: the producer's position as last seen
 * @parked: our epoch
 * @rung: the last of the producer's epochs for which we rang
 * @pins: borrowed frames
 * @high_water: most bytes seen waiting
 * @final: the producer is gone for good: busy frames will not be committed. Set by
 *	   the consumer's thread, after it has seen the end in the producer's state,
 *	   or by what has waited for the producer
 * @all_seen: the last look at the producer's position was made
 * @kinds: a bit for each kind of frame that may come
 */
struct kucomms_ring_consumer {
	struct kucomms_consumer *own;
	const struct kucomms_producer *peer;
	const unsigned char *data;
	__u64 size;
	__u64 position;
	__u64 published;
	__u64 available;
	__u64 parked;
	__u64 rung;
	struct kucomms_pin pins;
	__u64 high_water;
	int final;
	int all_seen;
	__u32 kinds;
};

/**
 * struct kucomms_view - a message in place, its header copied and checked
 * @data: in the ring; a hostile producer may change the bytes at any time
 * @length: of the data
 * @flags: KUCOMMS_FLAG_*
 * @kind: KUCOMMS_KIND_*
 * @buffers: how many are handed over: the data begin with a struct kucomms_carried
 *	     for each
 * @type: the user's
 * @id: the user's
 * @user_value: the user's
 */
struct kucomms_view {
	const unsigned char *data;
	__u32 length;
	__u32 flags;
	__u32 kind;
	__u32 buffers;
	__u64 type;
	__u64 id;
	__u64 user_value;
};

/* Bytes that a message of @length takes in the ring. Cannot overflow. */
static inline __u64 kucomms_frame_span(__u32 length)
{
	return (KUCOMMS_HEADER_SIZE + length + KUCOMMS_FRAME_ALIGN - 1) &
	       ~(__u64)(KUCOMMS_FRAME_ALIGN - 1);
}

/* @kind: with kucomms_frame_kind() for one that hands over buffers. */
static inline __u64 kucomms_frame_control(__u32 length, __u32 flags, __u32 kind)
{
	return (__u64)length | (__u64)flags << 32 | (__u64)kind << 48;
}

/* The kind of a message that hands over @buffers, at most KUCOMMS_CARRIED_MAX. */
static inline __u32 kucomms_frame_kind(__u32 buffers)
{
	return buffers ? KUCOMMS_KIND_BUFFER | buffers << 8 :
			 KUCOMMS_KIND_MESSAGE;
}

static inline void kucomms_pins_init(struct kucomms_pin *pins)
{
	pins->prev = pins;
	pins->next = pins;
	pins->position = 0;
}

static inline void kucomms_pin_add(struct kucomms_pin *pins,
				   struct kucomms_pin *pin, __u64 position)
{
	pin->position = position;
	pin->prev = pins->prev;
	pin->next = pins;
	pins->prev->next = pin;
	pins->prev = pin;
}

static inline void kucomms_pin_remove(struct kucomms_pin *pin)
{
	pin->prev->next = pin->next;
	pin->next->prev = pin->prev;
	pin->prev = pin;
	pin->next = pin;
}

/* The oldest pinned position, or @otherwise when nothing is pinned. */
static inline __u64 kucomms_pins_oldest(const struct kucomms_pin *pins,
					__u64 otherwise)
{
	return pins->next == pins ? otherwise : pins->next->position;
}

/* ---- producer ---------------------------------------------------------- */

static inline void
kucomms_ring_producer_init(struct kucomms_ring_producer *p,
			   struct kucomms_producer *own,
			   const struct kucomms_consumer *peer,
			   unsigned char *data, __u64 size)
{
	p->own = own;
	p->peer = peer;
	p->data = data;
	p->size = size;
	p->position = 0;
	p->consumed = 0;
	p->parked = 0;
	p->wanted = 0;
	p->rung = 0;
	p->held_count = 0;
	p->high_water = 0;
	kucomms_pins_init(&p->pins);
}

static inline struct kucomms_frame *
kucomms_ring_frame_at(const struct kucomms_ring_producer *p, __u64 position)
{
	return (struct kucomms_frame *)(p->data + (position & (p->size - 1)));
}

/*
 * Forget the held frames that were committed or discarded since. A commit takes
 * no lock, so it only changes the frame's control word, which the consumer cannot
 * write.
 */
static inline void kucomms_ring_forget_committed(struct kucomms_ring_producer *p)
{
	const struct kucomms_frame *frame;
	unsigned int i, kept = 0;
	__u64 control;

	for (i = 0; i < p->held_count; i++) {
		frame = kucomms_ring_frame_at(p, p->held[i]);
		/*
		 * pairs with smp_store_release() in kucomms_ring_finish(): what
		 * was written there comes before what is written there next
		 * model: held.pml WITHOUT_FORGET_ACQUIRE
		 */
		control = smp_load_acquire(&frame->control);
		if (control & (__u64)KUCOMMS_FLAG_BUSY << 32)
			p->held[kept++] = p->held[i];
	}
	p->held_count = kept;
}

/*
 * Look where the consumer is. -EPROTO when it is where it cannot be.
 *
 * THE rule of space: a consumer's position frees no frame that is not committed.
 * No consumer can be beyond such a frame, since it stops there; so one that says
 * it is breaks the rules. This is the only place that reads its position in order
 * to write into the ring again.
 */
static inline int kucomms_ring_refresh_consumed(struct kucomms_ring_producer *p)
{
	__u64 limit = p->position;
	/*
	 * pairs with smp_store_release() in kucomms_ring_give_back()
	 * model: transfer.pml WITHOUT_CONSUMED_ACQUIRE
	 */
	__u64 seen = smp_load_acquire(&p->peer->position);

	/* After that look: a frame that the consumer has passed was committed. */
	if (p->held_count) {
		kucomms_ring_forget_committed(p);
		if (p->held_count)
			limit = p->held[0];
	}
	if (seen & (KUCOMMS_FRAME_ALIGN - 1) ||
	    seen - p->consumed > limit - p->consumed)
		return -EPROTO;
	p->consumed = seen;
	return 0;
}

/* Bytes that can be reserved as far as is known without looking. */
static inline __u64 kucomms_ring_room(const struct kucomms_ring_producer *p)
{
	__u64 oldest = kucomms_pins_oldest(&p->pins, p->consumed);

	/* A dropped loan whose view lives on may lie behind the consumer. */
	if (oldest - p->consumed < p->position - p->consumed)
		oldest = p->consumed;
	return p->size - (p->position - oldest);
}

/* 0 when @span bytes can be reserved now, -EAGAIN, -EPROTO. */
static inline int kucomms_ring_has_room(struct kucomms_ring_producer *p,
					__u64 span)
{
	__u64 waiting;
	int err;

	if (span <= kucomms_ring_room(p))
		return 0;
	err = kucomms_ring_refresh_consumed(p);
	if (err)
		return err;
	waiting = p->position - p->consumed;
	if (waiting > p->high_water)
		p->high_water = waiting;
	return span <= kucomms_ring_room(p) ? 0 : -EAGAIN;
}

/* Say that the producer does not sleep for space any more. Its lock is held. */
static inline void kucomms_ring_unpark_for_space(struct kucomms_ring_producer *p)
{
	if (!p->wanted)
		return;
	p->wanted = 0;
	/* pairs with READ_ONCE() in kucomms_ring_producer_starves() */
	WRITE_ONCE(p->own->wanted, 0);
}

/**
 * kucomms_ring_next - where the next message goes
 * @p: the producer, its lock held until one of the two below was called
 * @length: bytes of data
 * @frame: where the frame is put
 *
 * Nothing is taken yet. To follow: kucomms_ring_publish(), when the message was
 * written already, or kucomms_ring_hold(), to write it later.
 *
 * Return: 0, -EAGAIN when full, -EMSGSIZE when it can never fit, -EPROTO when
 * the consumer broke the rules.
 */
static inline int kucomms_ring_next(struct kucomms_ring_producer *p,
				    __u32 length, struct kucomms_frame **frame)
{
	__u64 span = kucomms_frame_span(length);
	int err;

	if (span > p->size)
		return -EMSGSIZE;
	err = kucomms_ring_has_room(p, span);
	if (err)
		return err;
	*frame = kucomms_ring_frame_at(p, p->position);
	return 0;
}

static inline void kucomms_ring_move(struct kucomms_ring_producer *p,
				     __u32 length)
{
	p->position += kucomms_frame_span(length);
	/*
	 * pairs with smp_load_acquire() in kucomms_ring_refresh_available()
	 * model: transfer.pml WITHOUT_MOVE_RELEASE
	 */
	smp_store_release(&p->own->position, p->position);
	kucomms_ring_unpark_for_space(p);
}

/**
 * kucomms_ring_publish - make the next frame a message
 * @p: the producer, its lock still held
 * @frame: from kucomms_ring_next(), but for its control word all written
 * @length: as there
 * @flags: KUCOMMS_FLAG_*
 * @kind: as of kucomms_frame_control()
 *
 * The consumer hears of it once, when it is whole: cheaper than a reserve and a
 * commit, after which it often looks twice. Then ask
 * kucomms_ring_wake_consumer().
 */
static inline void kucomms_ring_publish(struct kucomms_ring_producer *p,
					struct kucomms_frame *frame,
					__u32 length, __u32 flags, __u32 kind)
{
	WRITE_ONCE(frame->control, kucomms_frame_control(length, flags, kind));
	kucomms_ring_move(p, length);
}

/* Whether one more frame can be held. The producer's lock is held. */
static inline int kucomms_ring_can_hold(struct kucomms_ring_producer *p)
{
	if (p->held_count == KUCOMMS_HELD_MOST)
		kucomms_ring_forget_committed(p);
	return p->held_count < KUCOMMS_HELD_MOST;
}

/*
 * Take the next frame, to write and kucomms_ring_commit() it later. Only after
 * kucomms_ring_can_hold().
 */
static inline void kucomms_ring_hold(struct kucomms_ring_producer *p,
				     struct kucomms_frame *frame, __u32 length)
{
	p->held[p->held_count++] = p->position;
	WRITE_ONCE(frame->control,
		   kucomms_frame_control(length, KUCOMMS_FLAG_BUSY,
					 KUCOMMS_KIND_MESSAGE));
	kucomms_ring_move(p, length);
}

/**
 * kucomms_ring_reserve - take the next bytes of the ring for a message
 * @p: the producer, its lock held
 * @length: bytes of data
 * @frame: where the frame is put; type, id, user_value and data are to be
 *	   written, then kucomms_ring_commit() or kucomms_ring_discard()
 *
 * Return: as kucomms_ring_next(), and -ENOBUFS when KUCOMMS_HELD_MOST frames are
 * not committed yet.
 */
static inline int kucomms_ring_reserve(struct kucomms_ring_producer *p,
				       __u32 length,
				       struct kucomms_frame **frame)
{
	int err = kucomms_ring_next(p, length, frame);

	if (err)
		return err;
	if (!kucomms_ring_can_hold(p))
		return -ENOBUFS;
	kucomms_ring_hold(p, *frame, length);
	return 0;
}

static inline void kucomms_ring_finish(struct kucomms_frame *frame,
				       __u32 length, __u32 flags, __u32 kind)
{
	/*
	 * pairs with smp_load_acquire() in kucomms_ring_peek()
	 * model: transfer.pml WITHOUT_FINISH_RELEASE
	 */
	smp_store_release(&frame->control,
			  kucomms_frame_control(length, flags, kind));
}

/* Make a reserved frame a message. Then ask kucomms_ring_wake_consumer(). */
static inline void kucomms_ring_commit(struct kucomms_frame *frame,
				       __u32 length, __u32 flags)
{
	kucomms_ring_finish(frame, length, flags, KUCOMMS_KIND_MESSAGE);
}

/* Drop a reserved frame; the consumer skips it. Then ask as after a commit. */
static inline void kucomms_ring_discard(struct kucomms_frame *frame,
					__u32 length)
{
	kucomms_ring_finish(frame, length, KUCOMMS_FLAG_DISCARD,
			    KUCOMMS_KIND_MESSAGE);
}

/**
 * kucomms_ring_wake_consumer - must the consumer's doorbell be rung?
 * @p: the producer, after one or many commits
 *
 * Two senders at once may both be told to ring: one bell too many, never one
 * too few. (The kernel has a doorbell with a level, and so must_ring() of its own.)
 */
static inline int kucomms_ring_wake_consumer(struct kucomms_ring_producer *p)
{
	__u64 epoch;

	/*
	 * pairs with smp_mb() in kucomms_ring_park_for_data()
	 * model: park.pml WITHOUT_WAKE_CONSUMER_MB
	 */
	smp_mb();
	epoch = READ_ONCE(p->peer->parked);
	if (epoch == READ_ONCE(p->rung))
		return 0;
	WRITE_ONCE(p->rung, epoch);
	return 1;
}

/**
 * kucomms_ring_park_for_space - say that the producer sleeps until space comes
 * @p: the producer, its lock held
 * @span: bytes that are wanted
 *
 * Return: 0 when it may sleep, after asking kucomms_ring_wake_consumer(); 1 when
 * there is room (or something is wrong) and it must try again instead.
 */
static inline int kucomms_ring_park_for_space(struct kucomms_ring_producer *p,
					      __u64 span)
{
	p->wanted = span;
	WRITE_ONCE(p->own->wanted, span);
	WRITE_ONCE(p->own->parked, ++p->parked);
	/*
	 * pairs with smp_mb() in kucomms_ring_wake_producer()
	 * model: park.pml WITHOUT_PARK_FOR_SPACE_MB
	 */
	smp_mb();
	if (kucomms_ring_has_room(p, span) == -EAGAIN)
		return 0;
	kucomms_ring_unpark_for_space(p);
	return 1;
}

/* Say that nothing more will be committed. The bell is to be rung after it. */
static inline void kucomms_ring_set_state(struct kucomms_ring_producer *p,
					  __u32 state)
{
	/*
	 * pairs with smp_load_acquire() in kucomms_ring_peer_state()
	 * model: close.pml WITHOUT_SET_STATE_RELEASE
	 */
	smp_store_release(&p->own->state, state);
}

/* ---- consumer ---------------------------------------------------------- */

static inline void
kucomms_ring_consumer_init(struct kucomms_ring_consumer *c,
			   struct kucomms_consumer *own,
			   const struct kucomms_producer *peer,
			   const unsigned char *data, __u64 size)
{
	c->own = own;
	c->peer = peer;
	c->data = data;
	c->size = size;
	c->position = 0;
	c->published = 0;
	c->available = 0;
	c->parked = 0;
	c->rung = 0;
	c->high_water = 0;
	c->final = 0;
	c->all_seen = 0;
	c->kinds = 1 << KUCOMMS_KIND_MESSAGE;
	kucomms_pins_init(&c->pins);
}

/* May this control word come, which is not that of a plain message? */
static inline int
kucomms_ring_kind_fits(const struct kucomms_ring_consumer *c, __u64 control)
{
	__u32 flags = (__u32)(control >> 32) & 0xffff;
	__u32 kind = (control >> 48) & 0xff;
	__u32 buffers = control >> 56;

	if (flags & ~(__u32)KUCOMMS_FLAGS || kind >= 32 ||
	    !(c->kinds & (__u32)1 << kind))
		return 0;
	if (kind != KUCOMMS_KIND_BUFFER)
		return !buffers && !(flags & KUCOMMS_FLAG_NOTICE);
	return buffers && (__u32)control >=
	       buffers * (__u32)sizeof(struct kucomms_carried);
}

/* KUCOMMS_STATE_* of the producer; what it committed before is visible then. */
static inline __u32
kucomms_ring_peer_state(const struct kucomms_ring_consumer *c)
{
	/*
	 * pairs with smp_store_release() in kucomms_ring_set_state()
	 * model: close.pml WITHOUT_PEER_STATE_ACQUIRE
	 */
	return smp_load_acquire(&c->peer->state);
}

/*
 * Look how far the producer is. -EPROTO when it is where it cannot be.
 *
 * A producer can say that it is gone and go on writing. So the first look with
 * final set is the last one.
 */
static inline int
kucomms_ring_refresh_available(struct kucomms_ring_consumer *c)
{
	int last = c->final;
	__u64 seen;

	if (c->all_seen)
		return 0;
	/*
	 * pairs with smp_store_release() in kucomms_ring_move()
	 * model: transfer.pml WITHOUT_AVAILABLE_ACQUIRE
	 */
	seen = smp_load_acquire(&c->peer->position);
	if (seen & (KUCOMMS_FRAME_ALIGN - 1) || seen - c->published > c->size ||
	    seen - c->published < c->available - c->published)
		return -EPROTO;
	c->available = seen;
	c->all_seen = last;
	if (seen - c->position > c->high_water)
		c->high_water = seen - c->position;
	return 0;
}

/**
 * kucomms_ring_peek - look at the next message
 * @c: the consumer
 * @view: filled in; valid until kucomms_ring_release() has passed it
 *
 * Skips what was discarded, looks at the producer's position at most once.
 *
 * A producer can fill the ring with what is to be skipped by one store, over and
 * over. So this ends after KUCOMMS_SKIP_MOST frames, and the caller, before it
 * looks again, gives back and lets others have their turn.
 *
 * Return: 0, -EAGAIN when there is none yet, KUCOMMS_SKIPPED when there may be
 * one behind what was skipped, -EPROTO when the producer broke the rules.
 */
static inline int kucomms_ring_peek(struct kucomms_ring_consumer *c,
				    struct kucomms_view *view)
{
	const struct kucomms_frame *frame;
	unsigned int skipped = 0;
	int refreshed = 0;
	__u64 control;
	__u64 span;
	__u32 flags;
	int err;

	for (;;) {
		if (c->position == c->available) {
			if (refreshed)
				return -EAGAIN;
			err = kucomms_ring_refresh_available(c);
			if (err)
				return err;
			if (c->position == c->available)
				return -EAGAIN;
			refreshed = 1;
		}
		frame = (const struct kucomms_frame *)
			(c->data + (c->position & (c->size - 1)));
		/*
		 * pairs with smp_store_release() in kucomms_ring_finish()
		 * model: transfer.pml WITHOUT_PEEK_ACQUIRE
		 */
		control = smp_load_acquire(&frame->control);
		span = kucomms_frame_span((__u32)control);
		flags = (__u32)(control >> 32) & 0xffff;
		if (span > c->available - c->position ||
		    (control & ~KUCOMMS_PLAIN &&
		     !kucomms_ring_kind_fits(c, control)))
			return -EPROTO;
		if (flags & KUCOMMS_FLAG_BUSY && !c->final)
			return -EAGAIN;
		if (!(flags & (KUCOMMS_FLAG_BUSY | KUCOMMS_FLAG_DISCARD)))
			break;
		WRITE_ONCE(c->position, c->position + span);
		if (++skipped == KUCOMMS_SKIP_MOST)
			return KUCOMMS_SKIPPED;
	}
	view->data = (const unsigned char *)(frame + 1);
	view->length = (__u32)control;
	view->flags = flags;
	view->kind = (control >> 48) & 0xff;
	view->buffers = control >> 56;
	view->type = READ_ONCE(frame->type);
	view->id = READ_ONCE(frame->id);
	view->user_value = READ_ONCE(frame->user_value);
	return 0;
}

/*
 * Is there something at the front, a message or nonsense? For who spins: a hint,
 * unordered; the peek that follows looks properly. A busy frame is nothing: the
 * producer may take as long as it likes to commit it.
 */
static inline int
kucomms_ring_has_front(const struct kucomms_ring_consumer *c)
{
	const struct kucomms_frame *frame;

	if (c->all_seen)
		return c->position != c->available;
	if (READ_ONCE(c->peer->position) == c->position)
		return 0;
	frame = (const struct kucomms_frame *)
		(c->data + (c->position & (c->size - 1)));
	return !(READ_ONCE(frame->control) & (__u64)KUCOMMS_FLAG_BUSY << 32);
}

/* Go on to the next message. The bytes stay ours until they are released. */
static inline void kucomms_ring_advance(struct kucomms_ring_consumer *c,
					const struct kucomms_view *view)
{
	/* In the kernel, others ask how much there is to read. */
	WRITE_ONCE(c->position, c->position + kucomms_frame_span(view->length));
}

/* Keep the message at the front beyond kucomms_ring_release(), and go on. */
static inline void kucomms_ring_borrow(struct kucomms_ring_consumer *c,
				       const struct kucomms_view *view,
				       struct kucomms_pin *pin)
{
	kucomms_pin_add(&c->pins, pin, c->position);
	kucomms_ring_advance(c, view);
}

/* Give back the bytes that were read and are not pinned: 1 when there were any. */
static inline int kucomms_ring_give_back(struct kucomms_ring_consumer *c)
{
	__u64 end = kucomms_pins_oldest(&c->pins, c->position);

	if (end == c->published)
		return 0;
	c->published = end;
	/*
	 * pairs with smp_load_acquire() in kucomms_ring_refresh_consumed()
	 * model: transfer.pml WITHOUT_GIVE_BACK_RELEASE
	 */
	smp_store_release(&c->own->position, end);
	return 1;
}

/**
 * kucomms_ring_wake_producer - must the producer's doorbell be rung?
 * @c: the consumer, after giving back
 *
 * Return: 1 when it must, for it sleeps until there is space; else 0.
 */
static inline int kucomms_ring_wake_producer(struct kucomms_ring_consumer *c)
{
	__u64 epoch;

	/*
	 * pairs with smp_mb() in kucomms_ring_park_for_space()
	 * model: park.pml WITHOUT_WAKE_PRODUCER_MB
	 */
	smp_mb();
	epoch = READ_ONCE(c->peer->parked);
	if (epoch == c->rung)
		return 0;
	WRITE_ONCE(c->rung, epoch);	/* the kernel's poll() reads it */
	return 1;
}

/**
 * kucomms_ring_release - give back, and ask for the doorbell
 * @c: the consumer
 *
 * Return: 1 when the producer's doorbell must be rung, else 0.
 */
static inline int kucomms_ring_release(struct kucomms_ring_consumer *c)
{
	return kucomms_ring_give_back(c) && kucomms_ring_wake_producer(c);
}

/**
 * kucomms_ring_release_lazily - give back, and ring late rather than often
 * @c: the consumer, which goes on reading
 *
 * While a fast producer waits for a slow consumer, ringing at each release would
 * wake it for a few messages at a time. So it is let sleep until a quarter of
 * the ring is free.
 *
 * Return: 1 when the doorbell must be rung, 0 when not, -EAGAIN when the
 * producer sleeps and was not rung for: kucomms_ring_wake_producer() is to be
 * asked before the consumer stops reading, for whatever reason.
 */
static inline int
kucomms_ring_release_lazily(struct kucomms_ring_consumer *c)
{
	__u64 waiting;

	if (!kucomms_ring_give_back(c))
		return 0;
	/*
	 * pairs with smp_mb() in kucomms_ring_park_for_space()
	 * model: lazy.pml WITHOUT_RELEASE_LAZILY_MB
	 */
	smp_mb();
	if (READ_ONCE(c->peer->parked) == c->rung)
		return 0;
	/* Any number may stand there: then it is rung for at once. */
	waiting = READ_ONCE(c->peer->position) - c->published;
	if (waiting <= c->size && waiting > c->size - c->size / 4)
		return -EAGAIN;
	return kucomms_ring_wake_producer(c);
}

/**
 * kucomms_ring_park_for_data - say that the consumer sleeps until data comes
 * @c: the consumer
 *
 * Return: 0 when it may sleep, 1 when there is a message (or something is
 * wrong) and it must look instead.
 */
static inline int kucomms_ring_park_for_data(struct kucomms_ring_consumer *c)
{
	__u64 before = c->position;
	struct kucomms_view view;

	WRITE_ONCE(c->own->parked, ++c->parked);
	/*
	 * pairs with smp_mb() in kucomms_ring_wake_consumer()
	 * model: park.pml WITHOUT_PARK_FOR_DATA_MB
	 */
	smp_mb();
	/* What was skipped must be released before sleeping, too. */
	return kucomms_ring_peek(c, &view) != -EAGAIN || c->position != before;
}

/**
 * kucomms_ring_producer_starves - does the producer sleep for what is pinned?
 * @c: the consumer, drained and parked for data
 *
 * Then nothing more comes before a pin is removed.
 */
static inline int
kucomms_ring_producer_starves(const struct kucomms_ring_consumer *c)
{
	/*
	 * The smp_mb() in kucomms_ring_park_for_data() before this pairs with
	 * the one in kucomms_ring_wake_consumer(), which a producer calls when
	 * it has parked: it rings, or is seen here.
	 */
	__u64 wanted = READ_ONCE(c->peer->wanted);

	return c->pins.next != &c->pins &&
	       wanted > c->size - (c->available - c->published);
}

#endif /* _KUCOMMS_RING_H */
