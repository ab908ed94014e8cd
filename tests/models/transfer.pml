/* SPDX-License-Identifier: MIT */
/*
 * Each message is read whole, once, in order, and its space is not used again
 * before; a discarded one is never seen. Messages are published, or held and then
 * committed or discarded in any order. Nobody sleeps: the consumer polls.
 */
#define SLOTS		2
#define MESSAGES	4
#define VALUES		5

#include "ring_model.h"

bit held[MESSAGES];

/* One of those that are held, or none. */
inline finish_one()
{
	p = 0;
	do
	:: p < MESSAGES && held[p] ->
		held[p] = 0;
		if
		:: commit(p)
		:: discard(p)
		fi;
		break
	:: p < MESSAGES -> p++
	:: p == MESSAGES -> break
	od;
	p = 0
}

active proctype producer()
{
	THREAD(PRODUCER);
	byte p;

	atomic {
		do
		:: tx_position < MESSAGES ->
			yield();
			has_room(1);
			if
			:: yes && tx_position < MESSAGES -> publish()
			:: yes && tx_position < MESSAGES ->
				held[tx_position] = 1;
				hold()
			:: else
			fi;
			finish_one()
		:: else -> break
		od;
		/* What is left in the end. */
		do
		:: p < MESSAGES && held[p] -> held[p] = 0; commit(p)
		:: p < MESSAGES && !held[p] -> p++
		:: else -> break
		od
	}
}

active proctype consumer()
{
	THREAD(CONSUMER);

	atomic {
		do
		:: rx_position < MESSAGES ->
			yield();
			if
			:: yes = 1
			:: has_front()
			fi;
			if
			:: yes ->
				peek();
				if
				:: yes -> consume()
				:: else -> skipped = 0
				fi;
				if
				:: give_back(rx_position)
				:: yes = 0
				fi
			:: else
			fi
		:: else -> break
		od
	}
}
