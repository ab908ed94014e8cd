/* SPDX-License-Identifier: MIT */
/*
 * ring.h in Promela, function by function: the same names without "kucomms_ring_"
 * and, with WITHOUT_..., each barrier can be left out. A frame takes one of SLOTS;
 * message number p is the one at position p, and its data is p + 1.
 */

#define PRODUCER	0
#define CONSUMER	1

#define THREADS		2

/* The words of the ring, first those that are released. */
#define TX_POSITION	0
#define TX_STATE	1
#define RX_POSITION	2
#define CONTROL(p)	(3 + (p) % SLOTS)
#define RELEASED	(3 + SLOTS)
#define TX_PARKED	(RELEASED + 0)
#define TX_WANTED	(RELEASED + 1)
#define RX_PARKED	(RELEASED + 2)
#define WORDS		(RELEASED + 3)
#define PLAIN		SLOTS
#define DATA(p)		((p) % SLOTS)

#include "memory.h"

/* Of a control word. 0 was never written: nonsense. */
#define BUSY		1
#define MESSAGE		2
#define DISCARDED	3

#define CLOSED		1

/* Each barrier, or what is left without it. */
#ifdef WITHOUT_MOVE_RELEASE
#define move_store	store
#else
#define move_store	store_release
#endif
#ifdef WITHOUT_AVAILABLE_ACQUIRE
#define available_load	load
#else
#define available_load	load_acquire
#endif
#ifdef WITHOUT_FINISH_RELEASE
#define finish_store	store
#else
#define finish_store	store_release
#endif
#ifdef WITHOUT_PEEK_ACQUIRE
#define peek_load	load
#else
#define peek_load	load_acquire
#endif
#ifdef WITHOUT_GIVE_BACK_RELEASE
#define give_back_store	store
#else
#define give_back_store	store_release
#endif
#ifdef WITHOUT_CONSUMED_ACQUIRE
#define consumed_load	load
#else
#define consumed_load	load_acquire
#endif
#ifdef WITHOUT_SET_STATE_RELEASE
#define state_store	store
#else
#define state_store	store_release
#endif
#ifdef WITHOUT_PEER_STATE_ACQUIRE
#define state_load	load
#else
#define state_load	load_acquire
#endif
#ifdef WITHOUT_WAKE_CONSUMER_MB
#define wake_consumer_mb()	skip
#else
#define wake_consumer_mb()	full_barrier()
#endif
#ifdef WITHOUT_PARK_FOR_DATA_MB
#define park_for_data_mb()	skip
#else
#define park_for_data_mb()	full_barrier()
#endif
#ifdef WITHOUT_PARK_FOR_SPACE_MB
#define park_for_space_mb()	skip
#else
#define park_for_space_mb()	full_barrier()
#endif
#ifdef WITHOUT_WAKE_PRODUCER_MB
#define wake_producer_mb()	skip
#else
#define wake_producer_mb()	full_barrier()
#endif
#ifdef WITHOUT_RELEASE_LAZILY_MB
#define release_lazily_mb()	skip
#else
#define release_lazily_mb()	full_barrier()
#endif

/* What is private to the sides, and the doorbells: they order nothing. */
byte tx_position, tx_consumed, tx_parked, tx_wanted, tx_rung;
byte rx_position, rx_published, rx_available, rx_parked, rx_rung;
bit tx_bell, rx_bell, final, all_seen, refreshed, skipped;

/* What was meant by each message, for the consumer's assertions. */
bit dropped[MESSAGES];

/* ---- producer: _seen_ is a byte of its own, _yes_ the answer --------------- */

inline refresh_consumed()
{
	consumed_load(RX_POSITION, seen);
	assert(seen >= tx_consumed && seen <= tx_position);
	tx_consumed = seen;
	seen = 0
}

inline has_room(span)
{
	if
	:: span <= SLOTS - (tx_position - tx_consumed)
	:: else -> refresh_consumed()
	fi;
	yes = (span <= SLOTS - (tx_position - tx_consumed))
}

inline unpark_for_space()
{
	if
	:: tx_wanted ->
		tx_wanted = 0;
		store(TX_WANTED, 0)
	:: else
	fi
}

inline move()
{
	tx_position++;
	move_store(TX_POSITION, tx_position);
	unpark_for_space()
}

inline publish()
{
	plain_write(DATA(tx_position), tx_position + 1);
	store(CONTROL(tx_position), MESSAGE);
	move()
}

inline hold()
{
	store(CONTROL(tx_position), BUSY);
	move()
}

inline commit(p)
{
	plain_write(DATA(p), p + 1);
	finish_store(CONTROL(p), MESSAGE)
}

inline discard(p)
{
	dropped[p] = 1;
	finish_store(CONTROL(p), DISCARDED)
}

/* Sleep until the doorbell is rung. */
inline hear(bell)
{
	bell -> bell = 0;
	touched()
}

/* And rings. */
inline wake_consumer()
{
	wake_consumer_mb();
	load(RX_PARKED, seen);
	if
	:: seen != tx_rung ->
		tx_rung = seen;
		rx_bell = 1;
		touched()
	:: else
	fi;
	seen = 0
}

inline park_for_space(span)
{
	tx_wanted = span;
	store(TX_WANTED, span);
	tx_parked++;
	store(TX_PARKED, tx_parked);
	park_for_space_mb();
	has_room(span);
	if
	:: yes -> unpark_for_space()
	:: else
	fi
}

inline set_state(s)
{
	state_store(TX_STATE, s)
}

/* ---- consumer: _seen_ and _yes_ as above ----------------------------------- */

inline refresh_available()
{
	available_load(TX_POSITION, seen);
	assert(seen - rx_published <= SLOTS && seen >= rx_available);
	rx_available = seen;
	seen = 0
}

/*
 * yes: there is a message at the front; it looks at the position at most once.
 * skipped: it answered KUCOMMS_SKIPPED, which here it may do after any frame.
 */
inline peek()
{
	yes = 0;
	skipped = 0;
	refreshed = 0;
	do
	:: rx_position == rx_available && (refreshed || all_seen) -> break
	:: rx_position == rx_available && !refreshed && !all_seen ->
		refreshed = 1;
		refresh_available();
#ifdef LAST_LOOK_EARLY
		all_seen = 1
#else
		all_seen = final
#endif
	:: else ->
		peek_load(CONTROL(rx_position), seen);
		assert(seen != 0);
		if
		:: seen == DISCARDED ->
			assert(dropped[rx_position]);
			rx_position++;
			seen = 0;
			if
			:: skipped = 1; break
			:: skipped = 0
			fi
		:: seen == MESSAGE ->
			assert(!dropped[rx_position]);
			yes = 1;
			seen = 0;
			break
		:: seen == BUSY ->
			seen = 0;
			if
			:: final -> rx_position++
			:: else -> break
			fi
		fi
	od;
	refreshed = 0
}

/* yes: something is at the front, perhaps: nothing is in order here. */
inline has_front()
{
	load(TX_POSITION, seen);
	yes = (seen != rx_position);
	if
	:: yes ->
		load(CONTROL(rx_position), seen);
		yes = (seen != BUSY)
	:: else
	fi;
	seen = 0
}

/* Read the message at the front, and go on to the next. */
inline consume()
{
	plain_read(DATA(rx_position), seen);
	assert(seen == rx_position + 1);
	seen = 0;
	rx_position++
}

/* yes: there was something to give back. */
inline give_back(end)
{
	yes = (end != rx_published);
	if
	:: yes ->
		rx_published = end;
		give_back_store(RX_POSITION, rx_published)
	:: else
	fi
}

/* And rings. */
inline wake_producer()
{
	wake_producer_mb();
	load(TX_PARKED, seen);
	if
	:: seen != rx_rung ->
		rx_rung = seen;
		tx_bell = 1;
		touched()
	:: else
	fi;
	seen = 0
}

inline release()
{
	give_back(rx_position);
	if
	:: yes -> wake_producer()
	:: else
	fi
}

/*
 * owing: it answered -EAGAIN. How much is little enough to wait, ring.h reads
 * without any order from a word of the producer's: here it is either.
 */
inline release_lazily()
{
	give_back(rx_position);
	if
	:: yes ->
		release_lazily_mb();
		load(TX_PARKED, seen);
		yes = (seen != rx_rung);
		seen = 0;
		if
		:: !yes
		:: yes -> owing = 1
		:: yes -> wake_producer()
		fi
	:: else
	fi
}

/* yes: look again instead of sleeping. */
inline park_for_data()
{
	before = rx_position;
	rx_parked++;
	store(RX_PARKED, rx_parked);
	park_for_data_mb();
	peek();
#ifndef WITHOUT_SKIPPED
	yes = (yes || skipped || rx_position != before);
#endif
	skipped = 0;
	before = 0
}
