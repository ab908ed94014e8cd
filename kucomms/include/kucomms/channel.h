/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * A channel in user space: two rings over mapped files, and a lock.
 *
 * The same code runs inside the Python extension and in C programs (through
 * client.h). It makes no system call but for mapping; who rings the doorbell
 * and who waits for it is the caller's part.
 *
 * Threads: the sending functions may be called by any number of threads at
 * once. The receiving functions belong to one thread at a time.
 */
#ifndef _KUCOMMS_CHANNEL_H
#define _KUCOMMS_CHANNEL_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <kucomms/ring.h>

#define KUCOMMS_RING_MAX	(1ULL << 32)	/* a length is 32 bits */
#define KUCOMMS_PUT_MAX		4096	/* bytes copied with the lock held */

/* Whose turn it is to send. */
#define KUCOMMS_TURN_ANY	0	/* a channel without turns */
#define KUCOMMS_TURN_OURS	1
#define KUCOMMS_TURN_THEIRS	2

/* The pages of one side, as this process sees them. */
struct kucomms_side {
	unsigned char *control;	/* KUCOMMS_CONTROL_PAGES pages */
	unsigned char *data;	/* twice ring_size bytes */
};

struct kucomms_channel {
	struct kucomms_ring_producer tx;
	struct kucomms_ring_consumer rx;
	pthread_mutex_t lock;		/* of tx; leaf, held for no system call */
	struct kucomms_side side[2];
	uint64_t ring_size;
	uint64_t page_size;
	uint64_t features;		/* in force */
	uint64_t turn_at;		/* of the message that brought the turn */
	uint32_t own;			/* our side: 0 or 1 */
	uint32_t turn;			/* KUCOMMS_TURN_*; atomic: any thread */
	/* counters: sent under the lock, received by the consumer's thread */
	uint64_t messages_sent;
	uint64_t bytes_sent;
	uint64_t messages_received;
	uint64_t bytes_received;
	uint64_t full_waits;
	uint64_t publishes;		/* frames: the peer may have slept */
	uint64_t releases;		/* times the producer might have slept */
	uint64_t doorbells_rung;	/* atomic: any thread */
	uint64_t protocol_errors;	/* atomic: any thread */
};

static inline uint64_t kucomms_page_size(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* @asked rounded up to a power of two of at least a page; 0 if too large. */
static inline uint64_t kucomms_ring_size(uint64_t asked)
{
	uint64_t size = kucomms_page_size();

	if (asked > KUCOMMS_RING_MAX)
		return 0;
	while (size < asked)
		size <<= 1;
	return size;
}

/* Bytes of one side's pages in its file. */
static inline uint64_t kucomms_side_size(uint64_t ring_size)
{
	return KUCOMMS_CONTROL_PAGES * kucomms_page_size() + ring_size;
}

/* Largest message of a ring, which is at most KUCOMMS_RING_MAX: 32 bits do. */
static inline uint64_t kucomms_message_max(uint64_t ring_size)
{
	return ring_size - KUCOMMS_HEADER_SIZE;
}

static inline void kucomms_side_unmap(struct kucomms_side *side,
				      uint64_t ring_size)
{
	if (side->control)
		munmap(side->control,
		       KUCOMMS_CONTROL_PAGES * kucomms_page_size());
	if (side->data)
		munmap(side->data, 2 * ring_size);
	side->control = NULL;
	side->data = NULL;
}

/*
 * Map one side's pages out of @fd, the data twice in a row. Children do not
 * inherit the mapping. Return: 0 or -errno.
 */
static inline int kucomms_side_map(struct kucomms_side *side, int fd,
				   uint64_t offset, uint64_t ring_size,
				   int writable)
{
	uint64_t control = KUCOMMS_CONTROL_PAGES * kucomms_page_size();
	int protection = PROT_READ | (writable ? PROT_WRITE : 0);
	unsigned int half;
	void *at;
	int err;

	side->control = NULL;
	side->data = NULL;
	at = mmap(NULL, control, protection, MAP_SHARED, fd, (off_t)offset);
	if (at == MAP_FAILED)
		goto err_errno;
	side->control = (unsigned char *)at;
	at = mmap(NULL, 2 * ring_size, PROT_NONE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED)
		goto err_errno;
	side->data = (unsigned char *)at;
	for (half = 0; half < 2; half++) {
		at = mmap(side->data + half * ring_size, ring_size, protection,
			  MAP_SHARED | MAP_FIXED, fd,
			  (off_t)(offset + control));
		if (at == MAP_FAILED)
			goto err_errno;
	}
	if (madvise(side->control, control, MADV_DONTFORK) ||
	    madvise(side->data, 2 * ring_size, MADV_DONTFORK))
		goto err_errno;
	return 0;

err_errno:
	err = -errno;
	kucomms_side_unmap(side, ring_size);
	return err;
}

static inline void kucomms_geometry_fill(struct kucomms_geometry *geometry,
					 uint32_t side, uint64_t ring_size,
					 uint64_t features)
{
	uint64_t page = kucomms_page_size();

	memset(geometry, 0, sizeof(*geometry));
	geometry->magic = KUCOMMS_MAGIC;
	geometry->version = KUCOMMS_ABI_VERSION;
	geometry->side = side;
	geometry->features = features;
	geometry->page_size = page;
	geometry->ring_size = ring_size;
	geometry->producer_offset = page;
	geometry->consumer_offset = 2 * page;
	geometry->data_offset = KUCOMMS_CONTROL_PAGES * page;
	geometry->frame_size = KUCOMMS_HEADER_SIZE;
}

/*
 * Is this the geometry that was agreed on? Return: 0, -EPROTO when it is not a
 * kucomms channel of this kind, -EPROTONOSUPPORT when it is one of a version or
 * with features that we do not know.
 */
static inline int kucomms_geometry_check(const struct kucomms_geometry *shared,
					 uint32_t side, uint64_t ring_size,
					 uint64_t features)
{
	struct kucomms_geometry expected, seen;

	memcpy(&seen, shared, sizeof(seen));	/* once: the peer may write it */
	kucomms_geometry_fill(&expected, side, ring_size, features);
	if (seen.magic != expected.magic)
		return -EPROTO;
	if (seen.version != expected.version ||
	    seen.features & ~KUCOMMS_FEATURES)
		return -EPROTONOSUPPORT;
	return memcmp(&seen, &expected, sizeof(seen)) ? -EPROTO : 0;
}

static inline void kucomms_channel_unmap(struct kucomms_channel *channel)
{
	kucomms_side_unmap(&channel->side[0], channel->ring_size);
	kucomms_side_unmap(&channel->side[1], channel->ring_size);
}

static inline void kucomms_channel_destroy(struct kucomms_channel *channel)
{
	kucomms_channel_unmap(channel);
	pthread_mutex_destroy(&channel->lock);
}

/*
 * First half of setting up: map our own side and say what it is. @ring_size is
 * as kucomms_ring_size() gave it, @features are those in force. Return: 0 or
 * -errno.
 */
static inline int kucomms_channel_init(struct kucomms_channel *channel,
				       uint32_t own, uint64_t ring_size,
				       uint64_t features, int fd,
				       uint64_t offset)
{
	int err;

	memset(channel, 0, sizeof(*channel));
	channel->own = own;
	channel->ring_size = ring_size;
	channel->page_size = kucomms_page_size();
	channel->features = features;
	if (features & KUCOMMS_FEATURE_TURNS)	/* who connects begins */
		channel->turn = own ? KUCOMMS_TURN_OURS : KUCOMMS_TURN_THEIRS;
	channel->turn_at = UINT64_MAX;		/* of none */
	err = kucomms_side_map(&channel->side[own], fd, offset, ring_size, 1);
	if (err)
		return err;
	kucomms_geometry_fill((struct kucomms_geometry *)
			      channel->side[own].control, own, ring_size,
			      features);
	err = -pthread_mutex_init(&channel->lock, NULL);
	if (err)
		kucomms_channel_unmap(channel);
	return err;
}

/*
 * Second half: map the peer's side, which we cannot write, and check it.
 * Return: 0, -EPROTO, -EPROTONOSUPPORT or -errno.
 */
static inline int kucomms_channel_attach(struct kucomms_channel *channel,
					 int fd, uint64_t offset)
{
	struct kucomms_side *own = &channel->side[channel->own];
	struct kucomms_side *peer = &channel->side[!channel->own];
	uint64_t page = channel->page_size;
	int err;

	err = kucomms_side_map(peer, fd, offset, channel->ring_size, 0);
	if (err)
		return err;
	err = kucomms_geometry_check((const struct kucomms_geometry *)
				     peer->control, !channel->own,
				     channel->ring_size, channel->features);
	if (err) {
		kucomms_side_unmap(peer, channel->ring_size);
		return err;
	}
	kucomms_ring_producer_init(&channel->tx,
				   (struct kucomms_producer *)
				   (own->control + page),
				   (const struct kucomms_consumer *)
				   (peer->control + 2 * page),
				   own->data, channel->ring_size);
	kucomms_ring_consumer_init(&channel->rx,
				   (struct kucomms_consumer *)
				   (own->control + 2 * page),
				   (const struct kucomms_producer *)
				   (peer->control + page),
				   peer->data, channel->ring_size);
	if (channel->features & KUCOMMS_FEATURE_POOLS)
		channel->rx.kinds |= 1 << KUCOMMS_KIND_BUFFER |
				     1 << KUCOMMS_KIND_POOL;
	return 0;
}

static inline int kucomms_channel_fault(struct kucomms_channel *channel,
					int err)
{
	if (err == -EPROTO)
		__atomic_fetch_add(&channel->protocol_errors, 1,
				   __ATOMIC_RELAXED);
	return err;
}

static inline int kucomms_channel_rang(struct kucomms_channel *channel,
				       int must_ring)
{
	if (must_ring)
		__atomic_fetch_add(&channel->doorbells_rung, 1,
				   __ATOMIC_RELAXED);
	return must_ring;
}

/* ---- turns -------------------------------------------------------------- */

/*
 * On a channel with turns one side may send. Its message takes the turn with it,
 * when room is taken for it, and brings it when it is handed out. So a send in
 * the wrong moment fails, whatever the other side does just then.
 *
 * The turn is taken by who has the lock, and brought by the consumer's thread.
 * Each does that only when it finds the other's last word there: so relaxed
 * accesses will do, and what is sent with the turn is ordered by the ring.
 *
 * Most channels have no turns. What is expected below keeps it from them: a load and
 * a branch that is not taken, at each end.
 */
static inline uint32_t kucomms_channel_turn(const struct kucomms_channel *channel)
{
	return __atomic_load_n(&channel->turn, __ATOMIC_RELAXED);
}

/* With the lock, or by the consumer's thread. Without turns nothing happens. */
static inline void kucomms_channel_set_turn(struct kucomms_channel *channel,
					    uint32_t turn)
{
	if (kucomms_channel_turn(channel) != KUCOMMS_TURN_ANY)
		__atomic_store_n(&channel->turn, turn, __ATOMIC_RELAXED);
}

static inline int kucomms_channel_has_turns(const struct kucomms_channel *channel)
{
	return kucomms_channel_turn(channel) != KUCOMMS_TURN_ANY;
}

/* May this side send? Any thread. Without turns it always may. */
static inline int kucomms_channel_has_turn(const struct kucomms_channel *channel)
{
	return kucomms_channel_turn(channel) != KUCOMMS_TURN_THEIRS;
}

/*
 * The message at the front is handed out: now it is our turn. But it comes once,
 * however often who looked at the message looks again.
 */
static inline void kucomms_channel_take_turn(struct kucomms_channel *channel)
{
	if (__builtin_expect(!kucomms_channel_has_turns(channel), 1) ||
	    channel->rx.position == channel->turn_at)
		return;
	channel->turn_at = channel->rx.position;
	kucomms_channel_set_turn(channel, KUCOMMS_TURN_OURS);
}

/* Is it one for the user? Others are between the two sides' keepers of pools. */
static inline int kucomms_kind_is_message(uint32_t kind, uint32_t flags)
{
	return kind == KUCOMMS_KIND_MESSAGE ||
	       (kind == KUCOMMS_KIND_BUFFER && !(flags & KUCOMMS_FLAG_NOTICE));
}

/* What was found at the front: may the peer have sent it? 0 or -EPROTO. */
static inline int
kucomms_channel_check_turn(const struct kucomms_channel *channel,
			   const struct kucomms_view *view)
{
	/*
	 * Read after the message: when that answers what another thread of ours
	 * has sent, then the turn that was taken for it is seen, too.
	 */
	uint32_t turn = kucomms_channel_turn(channel);

	if (__builtin_expect(!(turn | (view->flags & KUCOMMS_FLAG_TOKEN)), 1))
		return 0;
	if (view->flags & KUCOMMS_FLAG_TOKEN &&
	    (turn == KUCOMMS_TURN_ANY || view->length ||
	     view->flags & ~(uint32_t)KUCOMMS_FLAG_TOKEN))
		return -EPROTO;
	if (turn == KUCOMMS_TURN_OURS &&
	    channel->rx.position != channel->turn_at &&
	    kucomms_kind_is_message(view->kind, view->flags))
		return -EPROTO;		/* it has sent twice */
	return 0;
}

/* ---- sending ------------------------------------------------------------ */

/* A message was put, or is going to be. */
static inline int kucomms_channel_count_tx(struct kucomms_channel *channel,
					   uint32_t length, int err)
{
	if (err) {
		if (err == -EAGAIN)
			channel->full_waits++;
		return kucomms_channel_fault(channel, err);
	}
	channel->publishes++;
	channel->messages_sent++;
	channel->bytes_sent += length;
	return 0;
}

/*
 * Take room for a message. The lock is held, or something else keeps other
 * senders out. With @pin the bytes are not used again before
 * kucomms_channel_unpin_tx(). Return: 0, -EAGAIN, -EMSGSIZE, -EPROTO, -EPERM when
 * it is the peer's turn, -ENOBUFS when KUCOMMS_HELD_MOST messages are reserved and
 * not committed.
 */
static inline int
kucomms_channel_reserve_locked(struct kucomms_channel *channel, uint32_t length,
			       struct kucomms_frame **frame,
			       struct kucomms_pin *pin)
{
	int err = -EPERM;

	if (kucomms_channel_has_turn(channel))
		err = kucomms_ring_reserve(&channel->tx, length, frame);
	if (!err)	/* nobody sees the message before it is committed */
		kucomms_channel_set_turn(channel, KUCOMMS_TURN_THEIRS);
	if (!err && pin)
		kucomms_pin_add(&channel->tx.pins, pin, channel->tx.position -
				kucomms_frame_span(length));
	return kucomms_channel_count_tx(channel, length, err);
}

/* As kucomms_channel_reserve_locked(), from any thread. */
static inline int kucomms_channel_reserve(struct kucomms_channel *channel,
					  uint32_t length,
					  struct kucomms_frame **frame,
					  struct kucomms_pin *pin)
{
	int err;

	pthread_mutex_lock(&channel->lock);
	err = kucomms_channel_reserve_locked(channel, length, frame, pin);
	pthread_mutex_unlock(&channel->lock);
	return err;
}

/* Write all of a message but its control word. */
static inline void kucomms_channel_fill(struct kucomms_frame *frame,
					const void *data, uint32_t length,
					uint64_t type, uint64_t id,
					uint64_t user_value)
{
	frame->type = type;
	frame->id = id;
	frame->user_value = user_value;
	if (length)
		memcpy(frame + 1, data, length);
}

/*
 * Copy a message into the ring, without asking for the doorbell. The lock is
 * held, or something else keeps other senders out. Return: as reserve.
 */
static inline int
kucomms_channel_put_locked(struct kucomms_channel *channel, const void *data,
			   uint32_t length, uint32_t flags, uint64_t type,
			   uint64_t id, uint64_t user_value)
{
	uint32_t turn = kucomms_channel_turn(channel);
	struct kucomms_frame *frame;
	int err = -EPERM;

	if (__builtin_expect(turn != KUCOMMS_TURN_THEIRS, 1))
		err = kucomms_ring_next(&channel->tx, length, &frame);
	if (!err) {
		kucomms_channel_fill(frame, data, length, type, id, user_value);
		/* Before it is seen: the answer brings the turn back. */
		if (__builtin_expect(turn != KUCOMMS_TURN_ANY, 0))
			kucomms_channel_set_turn(channel, KUCOMMS_TURN_THEIRS);
		kucomms_ring_publish(&channel->tx, frame, length, flags,
				     KUCOMMS_KIND_MESSAGE);
	}
	return kucomms_channel_count_tx(channel, length, err);
}

/*
 * A frame of another kind than KUCOMMS_KIND_MESSAGE: @front, which that kind begins
 * with, and of a message with buffers the user's @data behind it. Otherwise as
 * kucomms_channel_put_locked().
 */
static inline int
kucomms_channel_put_front_locked(struct kucomms_channel *channel,
				 uint32_t kind, uint32_t flags,
				 const void *front, uint32_t front_length,
				 const void *data, uint32_t length,
				 uint64_t type, uint64_t id,
				 uint64_t user_value)
{
	int is_message = kucomms_kind_is_message(kind & 0xff, flags);
	struct kucomms_frame *frame;
	int err;

	if (length > UINT32_MAX - front_length)
		return -EMSGSIZE;
	if (is_message && !kucomms_channel_has_turn(channel))
		return -EPERM;
	err = kucomms_ring_next(&channel->tx, front_length + length, &frame);
	if (!err) {
		kucomms_channel_fill(frame, front, front_length, type, id,
				     user_value);
		if (length)
			memcpy((char *)(frame + 1) + front_length, data, length);
		if (is_message)
			kucomms_channel_set_turn(channel, KUCOMMS_TURN_THEIRS);
		kucomms_ring_publish(&channel->tx, frame, front_length + length,
				     flags, kind);
	}
	if (is_message)
		return kucomms_channel_count_tx(channel, length, err);
	if (!err)
		channel->publishes++;	/* its bell has to be counted */
	return kucomms_channel_fault(channel, err);
}

/* As kucomms_channel_put_locked(), from any thread. */
static inline int kucomms_channel_put(struct kucomms_channel *channel,
				      const void *data, uint32_t length,
				      uint32_t flags, uint64_t type,
				      uint64_t id, uint64_t user_value)
{
	struct kucomms_frame *frame;
	int err = -ENOBUFS;

	/* A long copy does not keep the others waiting, if it can be held. */
	if (length > KUCOMMS_PUT_MAX)
		err = kucomms_channel_reserve(channel, length, &frame, NULL);
	if (!err) {
		kucomms_channel_fill(frame, data, length, type, id, user_value);
		kucomms_ring_commit(frame, length, flags);
	}
	if (err != -ENOBUFS)
		return err;
	pthread_mutex_lock(&channel->lock);
	err = kucomms_channel_put_locked(channel, data, length, flags, type, id,
					 user_value);
	pthread_mutex_unlock(&channel->lock);
	return err;
}

/* The consumer may have to be woken for what was committed: 1, else 0. */
static inline int kucomms_channel_publish(struct kucomms_channel *channel)
{
	return kucomms_channel_rang(channel,
				    kucomms_ring_wake_consumer(&channel->tx));
}

/* Send: any thread. Return: 1 ring the doorbell, 0 sent, or as above. */
static inline int kucomms_channel_send(struct kucomms_channel *channel,
				       const void *data, uint32_t length,
				       uint32_t flags, uint64_t type,
				       uint64_t id, uint64_t user_value)
{
	int err = kucomms_channel_put(channel, data, length, flags, type, id,
				      user_value);

	return err ? err : kucomms_channel_publish(channel);
}

/*
 * Drop a reserved message; the turn that it had taken is ours again. Return: 1 ring
 * the doorbell, else 0.
 */
static inline int kucomms_channel_discard(struct kucomms_channel *channel,
					  struct kucomms_frame *frame,
					  uint32_t length)
{
	pthread_mutex_lock(&channel->lock);
	channel->messages_sent--;
	channel->bytes_sent -= length;
	kucomms_channel_set_turn(channel, KUCOMMS_TURN_OURS);
	pthread_mutex_unlock(&channel->lock);
	kucomms_ring_discard(frame, length);
	return kucomms_channel_publish(channel);
}

static inline void kucomms_channel_unpin_tx(struct kucomms_channel *channel,
					    struct kucomms_pin *pin)
{
	pthread_mutex_lock(&channel->lock);
	kucomms_pin_remove(pin);
	pthread_mutex_unlock(&channel->lock);
}

/*
 * Before sleeping until @length bytes can be sent. Return: -EAGAIN try again,
 * 0 sleep, 1 ring the doorbell and sleep.
 */
static inline int kucomms_channel_park_tx(struct kucomms_channel *channel,
					  uint32_t length)
{
	int again;

	pthread_mutex_lock(&channel->lock);
	again = kucomms_ring_park_for_space(&channel->tx,
					    kucomms_frame_span(length));
	if (!again)
		channel->publishes++;	/* the bell below has to be counted */
	pthread_mutex_unlock(&channel->lock);
	return again ? -EAGAIN : kucomms_channel_publish(channel);
}

/* Not sleeping for space any more, though nothing was sent. */
static inline void kucomms_channel_unpark_tx(struct kucomms_channel *channel)
{
	pthread_mutex_lock(&channel->lock);
	kucomms_ring_unpark_for_space(&channel->tx);
	pthread_mutex_unlock(&channel->lock);
}

/* Bytes that were sent and not yet released by the peer. */
static inline uint64_t kucomms_channel_tx_avail(struct kucomms_channel *channel)
{
	uint64_t waiting;

	pthread_mutex_lock(&channel->lock);
	kucomms_ring_refresh_consumed(&channel->tx);
	waiting = channel->tx.position - channel->tx.consumed;
	if (waiting > channel->tx.high_water)
		channel->tx.high_water = waiting;
	pthread_mutex_unlock(&channel->lock);
	return waiting;
}

/* Bytes, headers included, that can be sent now. */
static inline uint64_t kucomms_channel_tx_free(struct kucomms_channel *channel)
{
	uint64_t room;

	pthread_mutex_lock(&channel->lock);
	kucomms_ring_refresh_consumed(&channel->tx);
	room = kucomms_ring_room(&channel->tx);
	pthread_mutex_unlock(&channel->lock);
	return room;
}

/* ---- receiving ---------------------------------------------------------- */

/* Look at the next message: 0, -EAGAIN, -EPROTO, KUCOMMS_SKIPPED: look again. */
static inline int kucomms_channel_peek(struct kucomms_channel *channel,
				       struct kucomms_view *view)
{
	int err = kucomms_ring_peek(&channel->rx, view);

	if (!err)
		err = kucomms_channel_check_turn(channel, view);
	return kucomms_channel_fault(channel, err);
}

static inline void kucomms_channel_count_rx(struct kucomms_channel *channel,
					    const struct kucomms_view *view)
{
	channel->messages_received++;
	channel->bytes_received += view->length;
}

/* Done with the message that was looked at. */
static inline void kucomms_channel_advance(struct kucomms_channel *channel,
					   const struct kucomms_view *view)
{
	kucomms_channel_take_turn(channel);
	kucomms_channel_count_rx(channel, view);
	kucomms_ring_advance(&channel->rx, view);
}

/* As advance, for what is of another kind than KUCOMMS_KIND_MESSAGE. */
static inline void
kucomms_channel_advance_front(struct kucomms_channel *channel,
			      const struct kucomms_view *view)
{
	if (kucomms_kind_is_message(view->kind, view->flags)) {
		kucomms_channel_take_turn(channel);
		channel->messages_received++;
		channel->bytes_received += view->length - view->buffers *
					   sizeof(struct kucomms_carried);
	}
	kucomms_ring_advance(&channel->rx, view);
}

/* As advance, but the bytes stay until kucomms_channel_unpin_rx(). */
static inline void kucomms_channel_borrow(struct kucomms_channel *channel,
					  const struct kucomms_view *view,
					  struct kucomms_pin *pin)
{
	kucomms_channel_take_turn(channel);
	kucomms_channel_count_rx(channel, view);
	kucomms_ring_borrow(&channel->rx, view, pin);
}

/* Give back what was read: 1 ring the doorbell, else 0. */
static inline int kucomms_channel_release(struct kucomms_channel *channel)
{
	channel->releases++;
	return kucomms_channel_rang(channel,
				    kucomms_ring_release(&channel->rx));
}

/*
 * As release, for who goes on reading: -EAGAIN when the peer sleeps for space
 * and has to be thought of, with kucomms_channel_wake_producer(), before the
 * reading stops.
 */
static inline int
kucomms_channel_release_lazily(struct kucomms_channel *channel)
{
	int must_ring = kucomms_ring_release_lazily(&channel->rx);

	channel->releases++;
	kucomms_channel_rang(channel, must_ring == 1);
	return must_ring;
}

/* Does the peer sleep for space that it was given: 1 ring the doorbell. */
static inline int kucomms_channel_wake_producer(struct kucomms_channel *channel)
{
	return kucomms_channel_rang(channel,
				    kucomms_ring_wake_producer(&channel->rx));
}

static inline void kucomms_channel_unpin_rx(struct kucomms_pin *pin)
{
	kucomms_pin_remove(pin);
}

/* Before sleeping until a message comes: 1 look again, 0 sleep. */
static inline int kucomms_channel_park_rx(struct kucomms_channel *channel)
{
	return kucomms_ring_park_for_data(&channel->rx);
}

/* After parking: does the peer sleep for bytes that are borrowed here? */
static inline int
kucomms_channel_peer_starves(const struct kucomms_channel *channel)
{
	return kucomms_ring_producer_starves(&channel->rx);
}

/*
 * Bytes, headers included, that wait to be read: those known of when what the
 * peer says is nonsense.
 */
static inline uint64_t kucomms_channel_rx_avail(struct kucomms_channel *channel)
{
	kucomms_ring_refresh_available(&channel->rx);
	return channel->rx.available - channel->rx.position;
}

/* ---- closing ------------------------------------------------------------ */

/* Tell the peer that nothing more comes. Ring the doorbell after it. */
static inline void kucomms_channel_close(struct kucomms_channel *channel,
					 uint32_t state)
{
	kucomms_ring_set_state(&channel->tx, state);
}

/* ---- polling ------------------------------------------------------------ */

static inline void kucomms_cpu_relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ __volatile__("yield" ::: "memory");
#endif
}

/*
 * Spin until one of @count channels has something to read (or is in error), at
 * most @nanoseconds. Return: 1 when there is something, else 0.
 */
static inline int kucomms_channels_poll(struct kucomms_channel *const *channels,
					unsigned int count,
					uint64_t nanoseconds)
{
	struct timespec now;
	uint64_t end = 0, at;
	unsigned int i, round;

	for (;;) {
		for (round = 0; round < 32; round++) {
			for (i = 0; i < count; i++)
				if (kucomms_ring_has_front(&channels[i]->rx))
					return 1;
			kucomms_cpu_relax();
		}
		clock_gettime(CLOCK_MONOTONIC, &now);
		at = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
		if (!end)
			end = at + nanoseconds;
		else if (at >= end)
			return 0;
	}
}

#endif /* _KUCOMMS_CHANNEL_H */
