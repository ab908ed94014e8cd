/* SPDX-License-Identifier: MIT */
/*
 * Nobody sleeps though there is something to do: a consumer that parks for data
 * and a producer that parks for space, which may stop for good after any message.
 * And each message is read whole, once, in order, before its space is used again.
 */
#define SLOTS		2
#define MESSAGES	3
#define VALUES		6

#include "ring_model.h"

bit stopped;

active proctype producer()
{
	THREAD(PRODUCER);

	atomic {
		do
		:: tx_position < MESSAGES ->
			has_room(1);
			if
			:: yes ->
				if
				:: publish()
				:: hold(); commit(tx_position - 1)
				:: hold(); discard(tx_position - 1)
				fi;
				wake_consumer()
			:: else ->
				park_for_space(1);
				if
				:: yes
				:: else ->
					wake_consumer();
					hear(tx_bell)
				fi
			fi
		:: break
		od;
		stopped = 1
	}
}

active proctype consumer()
{
	THREAD(CONSUMER);
	byte before;

	atomic {
		do
		:: peek();
			if
			:: yes -> consume()
			:: skipped -> release()
			:: else ->
				release();
				park_for_data();
				if
				:: yes
				:: else ->
					if
					:: hear(rx_bell)
					:: stopped && rx_position == tx_position ->
						break
					fi
				fi
			fi
		od
	}
}
