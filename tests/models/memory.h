/* SPDX-License-Identifier: MIT */
/*
 * A weak memory in Promela, see README.md.
 *
 * A word keeps the values that were stored in it, and a thread a view: for each
 * word the oldest value that it may still load. A load takes any value from there
 * on; so stores arrive late and out of order, and loads are early. What forbids
 * that joins views:
 *
 *	store_release	the value carries the view of who stored it
 *	load_acquire	takes over the view that the value carries
 *	full_barrier	takes over what all barriers before it knew, and adds to it
 *
 * Plain data (of a message) has no such choice: to access it unordered is an
 * error by itself, a data race as in C and in the kernel's memory model.
 *
 * The including model defines WORDS, the first RELEASED of which may be released;
 * PLAIN data; THREADS; and VALUES, how many values of a word can matter at once.
 *
 * A thread is an atomic sequence that begins with THREAD(number). It yields to the
 * others before a load or a barrier that follows a store or a barrier. In between
 * nothing is lost: a load may take an older value than the newest at any time, so
 * it may as well come later, and a store sooner. Where a thread only loads and
 * loads again, it has to yield() by itself; after other shared things than words
 * it says touched().
 */

#define PLACES		(WORDS + 2 * PLAIN)
#define WRITES(p)	(WORDS + (p))		/* place of "writes to p" */
#define READS(p)	(WORDS + PLAIN + (p))	/* place of "reads of p" */

typedef View {
	byte at[PLACES]
}

typedef Values {
	byte at[VALUES]
}

byte last[PLACES];			/* index of the newest */
Values values[WORDS];
View carries[RELEASED * VALUES];
#define CARRIED(w, i)	carries[(w) * VALUES + (i)]
byte plain[PLAIN];
View view[THREADS];
View shared[2];				/* what barriers, and locks, have made known */
bit go[THREADS];

/* Used within one step only. */
hidden byte x, i, t, known;

#define FOR(variable, end, body)					\
	variable = 0;							\
	do								\
	:: variable < (end) -> body; variable++				\
	:: else -> break						\
	od;								\
	variable = 0

#define LOWER(counter)							\
	counter = (counter > known -> counter - known : 0)

/*
 * Forget what nobody can load any more, and count from there, so that what only
 * differs in its past is the same state.
 */
inline forget()
{
	d_step {
		FOR(x, PLACES,
			known = view[0].at[x];
			FOR(t, THREADS,
				known = (view[t].at[x] < known ->
					 view[t].at[x] : known));
			if
			:: known ->
				last[x] = last[x] - known;
				FOR(t, THREADS, LOWER(view[t].at[x]));
				LOWER(shared[0].at[x]);
				LOWER(shared[1].at[x]);
				FOR(i, RELEASED * VALUES,
					LOWER(carries[i].at[x]));
				if
				:: x < WORDS ->
					FOR(i, VALUES, values[x].at[i] =
						(i + known < VALUES ->
						 values[x].at[i + known] : 0))
				:: else
				fi;
				if
				:: x < RELEASED -> shift_carries()
				:: else
				fi
			:: else
			fi
		);
		known = 0
	}
}

inline shift_carries()
{
	FOR(i, VALUES,
		FOR(t, PLACES,
			CARRIED(x, i).at[t] = (i + known < VALUES ->
				CARRIED(x, i + known).at[t] : 0)))
}

#define THREAD(number)							\
	byte me = number, seen;						\
	bit yes, dirty = 1

inline yield()
{
	forget();
	go[me] = 0;
	go[me];
	dirty = 0
}

inline yield_if_dirty()
{
	if
	:: dirty -> yield()
	:: else
	fi
}

inline touched()
{
	dirty = 1
}

/* Who waits for its turn gets it. */
active proctype scheduler()
{
end:	do
	:: atomic { !go[0] -> go[0] = 1 }
	:: atomic { !go[1] -> go[1] = 1 }
#if THREADS > 2
	:: atomic { !go[2] -> go[2] = 1 }
#endif
	od
}

inline append(w, v)
{
	last[w]++;
	assert(last[w] < VALUES);	/* else VALUES is too small */
	values[w].at[last[w]] = v;
	view[me].at[w] = last[w];
	touched()
}

inline store(w, v)
{
	d_step { append(w, v) }
}

inline store_release(w, v)
{
	d_step {
		append(w, v);
		FOR(x, PLACES, CARRIED(w, last[w]).at[x] = view[me].at[x])
	}
}

inline load(w, v)
{
	yield_if_dirty();
	do
	:: view[me].at[w] < last[w] -> view[me].at[w]++
	:: break
	od;
	v = values[w].at[view[me].at[w]]
}

#define JOIN(to, from)							\
	FOR(x, PLACES, to.at[x] =					\
		(from.at[x] > to.at[x] -> from.at[x] : to.at[x]))

inline load_acquire(w, v)
{
	load(w, v);
	d_step { JOIN(view[me], CARRIED(w, view[me].at[w])) }
}

#define BARRIERS	0
#define LOCKS		1

inline learn(from)
{
	d_step { JOIN(view[me], shared[from]) }
}

inline tell(to)
{
	d_step { JOIN(shared[to], view[me]) }
}

inline full_barrier()
{
	yield_if_dirty();
	learn(BARRIERS);
	tell(BARRIERS);
	touched()
}

/* All other accesses to what is written are known, or it is a race. */
inline plain_write(p, v)
{
	d_step {
		assert(view[me].at[WRITES(p)] == last[WRITES(p)]);
		assert(view[me].at[READS(p)] == last[READS(p)]);
		last[WRITES(p)]++;
		view[me].at[WRITES(p)] = last[WRITES(p)];
		plain[p] = v
	}
}

inline plain_read(p, v)
{
	d_step {
		assert(view[me].at[WRITES(p)] == last[WRITES(p)]);
		last[READS(p)]++;
		view[me].at[READS(p)] = last[READS(p)];
		v = plain[p]
	}
}
