/* SPDX-License-Identifier: MIT */
/*
 * Whoever sees that the producer has closed, sees all that it had committed. The
 * last frame may never be committed: it is skipped. First whether more can come,
 * then what has come; and the doorbell is rung after the state was set.
 */
#define SLOTS		2
#define MESSAGES	2
#define VALUES		6

#include "ring_model.h"

active proctype producer()
{
	THREAD(PRODUCER);

	atomic {
		do
		:: tx_position < MESSAGES ->
			if
			:: publish()
			:: hold(); commit(tx_position - 1)
			:: hold(); discard(tx_position - 1)
			:: hold(); break
			fi;
			wake_consumer()
		:: break
		od;
		set_state(CLOSED);
		/* The system calls of a doorbell have locks. */
		tell(LOCKS);
		rx_bell = 1
	}
}

active proctype consumer()
{
	THREAD(CONSUMER);
	byte before;

	atomic {
		do
		::
#ifndef STATE_AFTER
			state_load(TX_STATE, seen);
			final = (seen == CLOSED);
#endif
			do
			:: peek();
				if
				:: yes -> consume()
#ifndef SKIPPED_IS_ALL
				:: skipped -> skipped = 0
#endif
				:: else -> break
				fi
			od;
#ifdef STATE_AFTER
			state_load(TX_STATE, seen);
			final = (seen == CLOSED);
#endif
			seen = 0;
			if
			:: final -> break
			:: else
			fi;
			release();
			park_for_data();
			if
			:: yes
			:: else ->
				hear(rx_bell);
#ifndef WITHOUT_BELL_ORDER
				learn(LOCKS)
#endif
			fi
		od;
		assert(rx_position == tx_position)
	}
}
