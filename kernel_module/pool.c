// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pools: memory of a channel that both sides have mapped, and the buffers of it
 * that messages hand over.
 *
 * A pool has one owner, who allocates in it: the user, or the module. Each buffer
 * begins at a page, and pool->buffers has an entry for each page; so nothing is
 * allocated when one comes or goes. Whose it is, by its state, of which only who
 * has the buffer makes another, by a compare-and-exchange:
 *
 *		of the user's pool		of a pool of the module
 *	AWAY	the user's			free
 *	IN_HAND	in the message callback		the same
 *	MINE	the module's			the same
 *	OUT	-				the user's
 *	GOING	to be given back		just being freed
 *
 * Of the user's pool, pool->used has the pages of all that are not AWAY; of one of
 * the module, pool->extents has the other pages. What is AWAY has a state, and no
 * more: its pool and its length are not to be looked at. A pool is alive, see
 * pool->refs, while it is open, for each such buffer, for each mapping, and for
 * each news of it that waits; then the runner takes it out of its slot. What is
 * left goes with the channel.
 *
 * What is owed to the user, buffers to be given back and news of pools, waits in
 * lists that any context can add to, and is sent by who sends next, or by the
 * runner: whoever may write into the ring then. So a channel whose only sender
 * takes no lock needs none for this either.
 */

#include <linux/cred.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <linux/sched/user.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "extents.h"
#include "internal.h"

#define POOL_SHIFT	32	/* of the offsets of pools, for mmap() */
#define POOL_FIRST	2	/* below are the two sides of the channel */
#define POOL_MOST	BIT(29)	/* of each side, in the life of a channel */
#define PAY_FRAMES	8	/* in a row, with interrupts off, */
#define PAY_BUFFERS	256	/* and what they give back */
#define USE_PIECE	4096UL	/* pages looked at with interrupts off */

#define KUCOMMS_GFP_POOL (GFP_KERNEL_ACCOUNT | __GFP_NOWARN | \
			  __GFP_RETRY_MAYFAIL)

/* Of the state of a buffer, or of news. */
enum {
	AWAY,
	IN_HAND,
	MINE,
	OUT,
	GOING,
	OPENED,
	CLOSED,
	CLAIMED = 0x10,		/* is just being sent, if there is room */
};

/**
 * struct kucomms_owed - to be told to the user
 * @node: in the list of what is owed
 * @state: what it is
 */
struct kucomms_owed {
	struct llist_node node;
	atomic_t state;
};

/**
 * struct kucomms_buffer - what begins at a page of a pool
 * @extent: of a pool of the module, what is free; else its pages are 0
 * @owed: its state, and its place among those that are given back
 * @pool: of which pool; this and what follows, while it is not AWAY
 * @length: bytes
 * @callback: in which it was allocated, see pools->callback; 0 for none
 *
 * 40 bytes for each page. An extent needs the node of @owed, which only buffers of
 * the user's pools use, and all from @pool on; the state is always there.
 */
struct kucomms_buffer {
	union {
		struct kucomms_extent extent;
		struct {
			struct kucomms_owed owed;
			struct kucomms_pool *pool;
			u64 length;
			u64 callback;
		};
	};
};

/* The extents have these for their entries. */
static_assert(sizeof(struct kucomms_buffer) == sizeof(struct kucomms_extent));
static_assert(sizeof(struct llist_node) <= offsetof(struct kucomms_extent, other));
static_assert(offsetof(struct kucomms_buffer, owed.state) ==
	      offsetof(struct kucomms_extent, other));
static_assert(offsetof(struct kucomms_buffer, pool) ==
	      offsetof(struct kucomms_extent, node));
static_assert(KUCOMMS_POOL_MAX >> PAGE_SHIFT <=
	      KUCOMMS_CHUNK * KUCOMMS_CHUNKS_MAX);

/**
 * struct kucomms_pool - a pool
 * @channel: whose
 * @number: of this pool, and no other of the channel
 * @refs: see above
 * @closed: by its owner
 * @closed_at: the user's: what was sent before this position is still taken
 * @let_go: the user's: the runner has seen all that
 * @page_count: how many
 * @pages: they, and
 * @at: where they are for us
 * @payer: whose user has locked them; NULL when nobody is charged for that
 * @lock: of @used and @extents
 * @used: the user's: pages that the kernel has
 * @extents: the module's: free pages
 * @opened: news of a pool of the module
 * @gone: the same
 * @release: frees it
 * @buffers: by their first page
 */
struct kucomms_pool {
	struct kucomms_channel *channel;
	u32 number;
	refcount_t refs;
	bool closed;
	u64 closed_at;
	bool let_go;
	unsigned long page_count;
	struct page **pages;
	void *at;
	const struct cred *payer;
	raw_spinlock_t lock;
	struct kucomms_used used;
	struct kucomms_extents extents;
	struct kucomms_owed opened;
	struct kucomms_owed gone;
	struct work_struct release;
	struct kucomms_buffer *buffers;
};

static bool is_the_users(const struct kucomms_pool *pool)
{
	return pool->number & 1;
}

static unsigned long page_of(const struct kucomms_buffer *buffer)
{
	return buffer - buffer->pool->buffers;
}

static unsigned long pages_for(u64 length)
{
	return (length + PAGE_SIZE - 1) >> PAGE_SHIFT;
}

/* ---- life ---------------------------------------------------------------- */

/*
 * The pages cannot be swapped out, so they count among those that the caller's user
 * has locked, as those of io_uring and perf do. The credentials hold the user.
 * Return: 0, -EPERM beyond RLIMIT_MEMLOCK.
 */
static int charge(struct kucomms_pool *pool)
{
	unsigned long limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
	atomic_long_t *locked = &current_user()->locked_vm;
	long before = atomic_long_read(locked);

	if (capable(CAP_IPC_LOCK))
		return 0;
	do {
		if (before + pool->page_count > limit)
			return -EPERM;
	} while (!atomic_long_try_cmpxchg(locked, &before,
					  before + pool->page_count));
	pool->payer = get_current_cred();
	return 0;
}

static void uncharge(struct kucomms_pool *pool)
{
	if (!pool->payer)
		return;
	atomic_long_sub(pool->page_count, &pool->payer->user->locked_vm);
	put_cred(pool->payer);
}

static void pool_free(struct kucomms_pool *pool)
{
	vunmap(pool->at);
	kucomms_pages_free(pool->pages, pool->page_count);
	uncharge(pool);
	kvfree(pool->buffers);
	kvfree(pool->used.bits);
	kfree(pool);
}

static void pool_release(struct work_struct *work)
{
	pool_free(container_of(work, struct kucomms_pool, release));
}

/* Any context but NMI. */
static void pool_put(struct kucomms_pool *pool)
{
	struct kucomms_channel *channel = pool->channel;

	if (!refcount_dec_and_test(&pool->refs))
		return;
	/* pairs with atomic_xchg() in kucomms_pools_sweep() */
	atomic_set_release(&channel->pools->sweep, 1);
	kucomms_channel_alert(channel);
}

static int alloc_contiguous(struct page **pages, unsigned long count)
{
	void *at = alloc_pages_exact(count << PAGE_SHIFT, KUCOMMS_GFP_PAGES);
	unsigned long i;

	if (!at)
		return -ENOMEM;
	for (i = 0; i < count; i++)
		pages[i] = virt_to_page(at + (i << PAGE_SHIFT));
	atomic_long_add(count, &kucomms_alive.pages);
	return 0;
}

static bool can_be_a_pool(u64 size, u32 flags)
{
	return size && !(size & ~PAGE_MASK) && size <= KUCOMMS_POOL_MAX &&
	       !(flags & ~KUCOMMS_POOL_CONTIGUOUS) &&
	       (!flags || size <= KUCOMMS_POOL_CONTIGUOUS_MAX);
}

/* A pool of a side, in no slot yet; charged to the caller. */
static struct kucomms_pool *pool_new(struct kucomms_channel *channel, u64 size,
				     u32 flags, u32 side)
{
	unsigned long count = size >> PAGE_SHIFT;
	struct kucomms_pool *pool;
	int err;

	pool = kzalloc(sizeof(*pool), KUCOMMS_GFP_POOL);
	if (!pool)
		return ERR_PTR(-ENOMEM);
	pool->channel = channel;
	pool->page_count = count;
	refcount_set(&pool->refs, 1);
	raw_spin_lock_init(&pool->lock);
	atomic_set(&pool->opened.state, OPENED);
	atomic_set(&pool->gone.state, CLOSED);
	INIT_WORK(&pool->release, pool_release);
	/* What the module opens is its own decision. */
	err = side ? charge(pool) : 0;
	if (err)
		goto err_free;
	err = -ENOMEM;
	pool->pages = kucomms_pages_list(count);
	pool->buffers = kvcalloc(count, sizeof(*pool->buffers), KUCOMMS_GFP_POOL);
	if (!pool->pages || !pool->buffers)
		goto err_free;
	if (side) {
		pool->used.bits = kvcalloc(BITS_TO_LONGS(count), sizeof(long),
					   KUCOMMS_GFP_POOL);
		if (!pool->used.bits)
			goto err_free;
	}
	if (flags & KUCOMMS_POOL_CONTIGUOUS)
		err = alloc_contiguous(pool->pages, count);
	else
		err = kucomms_pages_alloc(pool->pages, count);
	if (err)
		goto err_free;
	pool->at = vmap(pool->pages, count, VM_MAP, PAGE_KERNEL);
	if (pool->at)
		return pool;
	err = -ENOMEM;

err_free:
	pool_free(pool);
	return ERR_PTR(err);
}

/* ---- slots --------------------------------------------------------------- */

/* Whatever number a user writes: the slot is masked, also when it is guessed. */
static struct kucomms_pool **slot_of(struct kucomms_pools *pools, u32 number)
{
	return &pools->slots[number & 1][(number >> 1) % KUCOMMS_POOLS_MAX];
}

/*
 * The pool of this number, or NULL. For the runner, which alone takes pools out
 * of their slots; others hold the lock.
 */
static struct kucomms_pool *find_pool(struct kucomms_pools *pools, u32 number)
{
	struct kucomms_pool *pool;

	/* pairs with smp_store_release() in add_pool() */
	pool = smp_load_acquire(slot_of(pools, number));
	return pool && pool->number == number ? pool : NULL;
}

/* For those that are not the runner: with a reference. */
static struct kucomms_pool *get_pool(struct kucomms_pools *pools, u32 number)
{
	struct kucomms_pool *pool;

	spin_lock(&pools->lock);
	pool = find_pool(pools, number);
	if (pool && !refcount_inc_not_zero(&pool->refs))
		pool = NULL;
	spin_unlock(&pools->lock);
	return pool;
}

/*
 * The next number of a side whose slot is free: so it tells the slot, and is never
 * used again. The lock is held. Return: it, or -EMFILE.
 */
static s64 next_number(struct kucomms_pools *pools, u32 side)
{
	u32 next = pools->next[side], i;

	for (i = 0; i < KUCOMMS_POOLS_MAX && next + i < POOL_MOST; i++)
		if (!*slot_of(pools, 2 * (next + i) + side))
			return 2 * (next + i) + side;
	return -EMFILE;
}

/*
 * Return: its number, or -EMFILE. The user can guess the number and close the pool,
 * so who has no reference must not touch it any more.
 */
static s64 add_pool(struct kucomms_pool *pool, u32 side)
{
	struct kucomms_pools *pools = pool->channel->pools;
	s64 number;

	spin_lock(&pools->lock);
	number = next_number(pools, side);
	if (number >= 0) {
		pool->number = number;
		pools->next[side] = (number >> 1) + 1;
		/* pairs with smp_load_acquire() in find_pool() */
		smp_store_release(slot_of(pools, number), pool);
	}
	spin_unlock(&pools->lock);
	return number;
}

/*
 * Before all that memory is taken: is there a slot, and may the user have so much?
 * The bytes are taken by this. Return: 0, -EMFILE, -EDQUOT.
 */
static int take_bytes(struct kucomms_pools *pools, u64 size, u32 side)
{
	s64 err;

	spin_lock(&pools->lock);
	err = min_t(s64, next_number(pools, side), 0);
	if (!err && side && size > pools->limit - pools->taken)
		err = -EDQUOT;
	if (!err && side)
		pools->taken += size;
	spin_unlock(&pools->lock);
	return err;
}

static void give_bytes_back(struct kucomms_pools *pools, u64 size, u32 side)
{
	spin_lock(&pools->lock);
	if (side)
		pools->taken -= size;
	spin_unlock(&pools->lock);
}

/* A new pool in a slot, in @pool. Return: as add_pool(), or another -errno. */
static s64 open_pool(struct kucomms_channel *channel, u64 size, u32 flags,
		     u32 side, struct kucomms_pool **pool)
{
	struct kucomms_pools *pools = channel->pools;
	s64 number;

	if (!pools)
		return -EOPNOTSUPP;
	if (!can_be_a_pool(size, flags))
		return -EINVAL;
	number = take_bytes(pools, size, side);
	if (number < 0)
		return number;
	*pool = pool_new(channel, size, flags, side);
	number = PTR_ERR_OR_ZERO(*pool);
	if (number < 0)
		goto err_bytes;
	/* Of the module's pool there will be news. */
	refcount_set(&(*pool)->refs, side ? 1 : 2);
	number = add_pool(*pool, side);
	if (number >= 0)
		return number;

	pool_free(*pool);
err_bytes:
	give_bytes_back(pools, size, side);
	return number;
}

/* Has the user closed it, and was all received that may name it? The runner's. */
static bool is_over(const struct kucomms_pool *pool)
{
	/* pairs with smp_store_release() in close_users_pool() */
	return smp_load_acquire(&pool->closed) &&
	       (pool->let_go ||
		(s64)(pool->channel->rx.position - pool->closed_at) >= 0);
}

/* Let go of a pool that is over; look again if it is only closed. */
static void let_go_if_over(struct kucomms_pool *pool)
{
	if (pool->let_go || !READ_ONCE(pool->closed))
		return;
	if (is_over(pool)) {
		pool->let_go = true;
		pool_put(pool);
	} else {
		atomic_set(&pool->channel->pools->sweep, 1);
	}
}

/* Take out of their slots the pools that nobody has any more. The runner's. */
void kucomms_pools_sweep(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_pool *pool;
	int side, i;

	/* pairs with atomic_set_release() in pool_put() */
	if (!pools || !atomic_read(&pools->sweep) ||
	    !atomic_xchg(&pools->sweep, 0))
		return;
	for (side = 0; side < 2; side++) {
		for (i = 0; i < KUCOMMS_POOLS_MAX; i++) {
			/* pairs with smp_store_release() in add_pool() */
			pool = smp_load_acquire(&pools->slots[side][i]);
			if (pool && side)
				let_go_if_over(pool);
			if (!pool || refcount_read(&pool->refs))
				continue;
			spin_lock(&pools->lock);
			WRITE_ONCE(pools->slots[side][i], NULL);
			if (side)
				pools->taken -= (u64)pool->page_count << PAGE_SHIFT;
			spin_unlock(&pools->lock);
			/* A large one takes a while, and others wait for us. */
			queue_work(kucomms_workqueue, &pool->release);
		}
	}
}

/* Have room for the pools of a channel, and let messages have buffers. */
int kucomms_pools_new(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = kzalloc(sizeof(*pools), KUCOMMS_GFP_POOL);

	if (!pools)
		return -ENOMEM;
	spin_lock_init(&pools->lock);
	init_llist_head(&pools->back);
	init_llist_head(&pools->news);
	channel->pools = pools;
	channel->rx.kinds |= BIT(KUCOMMS_KIND_BUFFER);
	return 0;
}

/* Nobody has the channel any more, so nobody has one of its buffers. */
void kucomms_pools_free(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	int side, i;

	if (!pools)
		return;
	for (side = 0; side < 2; side++)
		for (i = 0; i < KUCOMMS_POOLS_MAX; i++)
			if (pools->slots[side][i])
				pool_free(pools->slots[side][i]);
	kfree(pools);
}

/* For debugfs: how many pools there are, and their pages. */
void kucomms_pools_count(struct kucomms_channel *channel, unsigned int *count,
			 u64 *pages)
{
	struct kucomms_pools *pools = channel->pools;
	int side, i;

	*count = 0;
	*pages = 0;
	if (!pools)
		return;
	spin_lock(&pools->lock);
	for (side = 0; side < 2; side++) {
		for (i = 0; i < KUCOMMS_POOLS_MAX; i++) {
			if (!pools->slots[side][i])
				continue;
			*count += 1;
			*pages += pools->slots[side][i]->page_count;
		}
	}
	spin_unlock(&pools->lock);
}

/* ---- what the user asks -------------------------------------------------- */

static u64 offset_of(u32 number)
{
	return ((u64)number + POOL_FIRST) << POOL_SHIFT;
}

static_assert(sizeof(struct kucomms_pool_request) == 56);
static_assert(offsetof(struct kucomms_pool_request, offset) == 16);
/* The sides end where the pools begin. */
static_assert(2 * (KUCOMMS_RING_MAX + KUCOMMS_CONTROL_PAGES * PAGE_SIZE) <=
	      (u64)POOL_FIRST << POOL_SHIFT);
/* For slot_of(). */
static_assert(!(KUCOMMS_POOLS_MAX & (KUCOMMS_POOLS_MAX - 1)));
static_assert(BIT_ULL(POOL_SHIFT) >= KUCOMMS_POOL_MAX);

/* Not before all that was sent is received that may name it. */
static void close_users_pool(struct kucomms_pool *pool)
{
	struct kucomms_ring_consumer *rx = &pool->channel->rx;
	u64 sent, received;
	s64 ahead;

	/*
	 * pairs with smp_store_release() in kucomms_ring_move(). And it comes before
	 * what was received meanwhile: so there is at most a ring between the two.
	 */
	sent = smp_load_acquire(&rx->peer->position);
	received = READ_ONCE(rx->position);
	/* The user may write any number there. */
	ahead = clamp_t(s64, sent - received, 0, rx->size);
	pool->closed_at = received + ahead;
	/* pairs with smp_load_acquire() in is_over() */
	smp_store_release(&pool->closed, true);
}

long kucomms_ioctl_open_pool(struct kucomms_channel *channel,
			     void __user *argument)
{
	struct kucomms_pool_request request;
	struct kucomms_pool *pool;
	s64 number;

	if (copy_from_user(&request, argument, sizeof(request)))
		return -EFAULT;
	if (request.number || request.offset ||
	    memchr_inv(request.reserved, 0, sizeof(request.reserved)))
		return -EINVAL;
	/* So that nothing has to be undone if the answer cannot be given. */
	if (copy_to_user(argument, &request, sizeof(request)))
		return -EFAULT;
	number = open_pool(channel, request.size, request.flags, 1, &pool);
	if (number < 0)
		return number;
	request.number = number;
	request.offset = offset_of(number);
	return copy_to_user(argument, &request, sizeof(request)) ? -EFAULT : 0;
}

long kucomms_ioctl_close_pool(struct kucomms_channel *channel,
			      void __user *argument)
{
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_pool_request request;
	struct kucomms_pool *pool;
	long err = -ENOENT;

	if (copy_from_user(&request, argument, sizeof(request)))
		return -EFAULT;
	if (request.size || request.flags || request.offset ||
	    memchr_inv(request.reserved, 0, sizeof(request.reserved)))
		return -EINVAL;
	if (!pools)
		return -EOPNOTSUPP;
	spin_lock(&pools->lock);
	pool = find_pool(pools, request.number);
	if (pool && is_the_users(pool) && !pool->closed) {
		close_users_pool(pool);
		err = 0;
	}
	spin_unlock(&pools->lock);
	if (!err) {
		/* pairs with atomic_xchg() in kucomms_pools_sweep() */
		atomic_set_release(&pools->sweep, 1);
		kucomms_channel_alert(channel);
	}
	return err;
}

static void pool_vm_open(struct vm_area_struct *vma)
{
	struct kucomms_pool *pool = vma->vm_private_data;

	refcount_inc(&pool->refs);
}

static void pool_vm_close(struct vm_area_struct *vma)
{
	pool_put(vma->vm_private_data);
}

static const struct vm_operations_struct pool_vm_ops = {
	.open = pool_vm_open,
	.close = pool_vm_close,
};

/* Whether a mapping is one of a pool, by its offset. */
bool kucomms_is_of_pool(const struct vm_area_struct *vma)
{
	return vma->vm_pgoff >> (POOL_SHIFT - PAGE_SHIFT) >= POOL_FIRST;
}

/**
 * kucomms_pool_mmap - map a part of a pool
 * @channel: the channel
 * @vma: where, and which pages
 *
 * The pages are ordinary ones, so that I/O can pin them: what is under way has
 * its own hold on them, whoever dies and whatever is closed meanwhile.
 *
 * Return: 0, -EINVAL, -EACCES, -ENOENT, -ESHUTDOWN, -ENOMEM.
 */
int kucomms_pool_mmap(struct kucomms_channel *channel,
		      struct vm_area_struct *vma)
{
	unsigned long first = vma->vm_pgoff & (BIT(POOL_SHIFT - PAGE_SHIFT) - 1);
	u64 number = (vma->vm_pgoff >> (POOL_SHIFT - PAGE_SHIFT)) - POOL_FIRST;
	unsigned long count = vma_pages(vma);
	struct kucomms_pool *pool;
	int err = -EINVAL;

	if (!(vma->vm_flags & VM_SHARED) || number >= 2 * POOL_MOST ||
	    !channel->pools)
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EACCES;
	if (test_bit(KUCOMMS_USER_GONE, &channel->state))
		return -ESHUTDOWN;
	pool = get_pool(channel->pools, number);
	if (!pool)
		return -ENOENT;
	if (first < pool->page_count && count <= pool->page_count - first) {
		first = array_index_nospec(first, pool->page_count);
		err = kucomms_pages_map(vma, pool->pages + first, VM_MAYEXEC);
	}
	if (err) {
		pool_put(pool);
		return err;
	}
	vma->vm_private_data = pool;
	vma->vm_ops = &pool_vm_ops;
	return 0;
}

/* ---- buffers ------------------------------------------------------------- */

/* These pages are free again. */
static void unuse(struct kucomms_pool *pool, unsigned long page,
		  unsigned long count)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&pool->lock, irq);
	if (is_the_users(pool))
		kucomms_mark_used(&pool->used, page, page + count, false);
	else
		kucomms_free_extent(&pool->extents, page, count);
	raw_spin_unlock_irqrestore(&pool->lock, irq);
}

/* The state becomes another if it is this one. Return: whether. */
static bool turn(struct kucomms_buffer *buffer, int from, int to)
{
	return atomic_cmpxchg(&buffer->owed.state, from, to) == from;
}

/* The same for one that is the module's to do with as it likes. */
static bool turn_ours(struct kucomms_buffer *buffer, int to)
{
	return turn(buffer, MINE, to) || turn(buffer, IN_HAND, to);
}

/*
 * Make a buffer AWAY that only the caller can turn: it holds the pool no longer.
 * With interrupts off this takes a time that is bounded, whatever its length: see
 * extents.c.
 */
static void drop(struct kucomms_buffer *buffer)
{
	struct kucomms_pool *pool = buffer->pool;

	atomic_set(&buffer->owed.state, AWAY);
	unuse(pool, page_of(buffer), pages_for(buffer->length));
	pool_put(pool);
}

/* Tell what is given back. Return: whether the runner has to be kicked for it. */
static bool owe(struct kucomms_buffer *buffer)
{
	return llist_add(&buffer->owed.node, &buffer->pool->channel->pools->back);
}

/*
 * Which callback we are in, of those that are called again when buffers are free,
 * or 0.
 */
static u64 callback_of(struct kucomms_pools *pools)
{
	return in_task() && READ_ONCE(pools->caller) == current ?
		       pools->callback : 0;
}

/*
 * The module has freed what was allocated in a callback, or in none. One that finds
 * too few buffers, frees those that it has got, and waits, would for these be called
 * again and do the same, for ever.
 */
static void freed(struct kucomms_channel *channel, u64 allocated)
{
	struct kucomms_pools *pools = channel->pools;
	u64 callback = callback_of(pools);

	if (callback) {
		pools->freed |= allocated != callback;
	} else if (atomic_read(&pools->is_short)) {
		atomic_set(&pools->came_back, 1);
		kucomms_channel_alert(channel);
	}
}

/**
 * kucomms_free_buffer - a buffer is not needed any more
 * @buffer: from kucomms_allocate() or kucomms_take_buffer(), or one of the message
 *	    in the callback; not to be used any more
 *
 * That of a pool of the user is given back to it, that of a pool of the module is
 * free again: if kucomms_allocate() has met -ENOBUFS, the buffers_available callback
 * is called, but not for what one callback has both allocated and freed. Any context
 * but NMI.
 */
void kucomms_free_buffer(struct kucomms_buffer *buffer)
{
	struct kucomms_channel *channel;
	u64 allocated;

	if (WARN_ON_ONCE(!turn_ours(buffer, GOING)))
		return;
	channel = buffer->pool->channel;
	allocated = buffer->callback;
	if (!is_the_users(buffer->pool)) {
		drop(buffer);
		freed(channel, allocated);
	} else if (owe(buffer)) {
		kucomms_channel_alert(channel);
	}
}
EXPORT_SYMBOL_GPL(kucomms_free_buffer);

/**
 * kucomms_buffer_data - its bytes
 * @buffer: the buffer
 *
 * Mapped page by page, so vmalloc_to_page() tells which page is where. The user has
 * them mapped, too, and can change them at any time.
 */
void *kucomms_buffer_data(const struct kucomms_buffer *buffer)
{
	return buffer->pool->at + (page_of(buffer) << PAGE_SHIFT);
}
EXPORT_SYMBOL_GPL(kucomms_buffer_data);

/**
 * kucomms_buffer_length - how many bytes it has
 * @buffer: the buffer
 */
u64 kucomms_buffer_length(const struct kucomms_buffer *buffer)
{
	return buffer->length;
}
EXPORT_SYMBOL_GPL(kucomms_buffer_length);

/* ---- pools of the module ------------------------------------------------- */

static void tell(struct kucomms_pool *pool, struct kucomms_owed *news)
{
	if (llist_add(&news->node, &pool->channel->pools->news))
		kucomms_channel_alert(pool->channel);
}

/**
 * kucomms_open_pool - a pool that the module allocates in
 * @channel: whose messages can hand over its buffers
 * @size: bytes, rounded up to pages
 * @flags: 0 or KUCOMMS_POOL_CONTIGUOUS
 *
 * The user is told, and maps it. The memory is charged to who calls this: from a
 * callback to nobody, so bound the channels that there can be. It ends by
 * kucomms_close_pool(), or with the channel. May sleep; from the open callback on.
 *
 * Return: the pool, or an error pointer: -EOPNOTSUPP when the user knows no
 * pools or the endpoint has no KUCOMMS_POOLS, -EINVAL, -ENOMEM, -EMFILE when
 * there are KUCOMMS_POOLS_MAX, those included that were closed and of which the
 * user still has something.
 */
struct kucomms_pool *kucomms_open_pool(struct kucomms_channel *channel,
				       u64 size, u32 flags)
{
	struct kucomms_pool *pool;
	s64 number;

	if (size > KUCOMMS_POOL_MAX)
		return ERR_PTR(-EINVAL);
	number = open_pool(channel, PAGE_ALIGN(size), flags, 0, &pool);
	if (number < 0)
		return ERR_PTR(number);
	kucomms_init_extents(&pool->extents, &pool->buffers->extent,
			     pool->page_count);
	tell(pool, &pool->opened);
	return pool;
}
EXPORT_SYMBOL_GPL(kucomms_open_pool);

/**
 * kucomms_close_pool - no more is allocated in a pool
 * @pool: from kucomms_open_pool(); not to be used any more
 *
 * Buffers of it that the module has stay valid until they are freed; they cannot
 * be sent any more. Those that the user has can still come in its messages. Any
 * context but NMI.
 */
void kucomms_close_pool(struct kucomms_pool *pool)
{
	if (WARN_ON_ONCE(READ_ONCE(pool->closed)))
		return;
	/* The reference that it had for being open is that of the news now. */
	WRITE_ONCE(pool->closed, true);
	tell(pool, &pool->gone);
}
EXPORT_SYMBOL_GPL(kucomms_close_pool);

/* Take @count free pages in a row. Return: the first of them, or page_count. */
static unsigned long use(struct kucomms_pool *pool, unsigned long count)
{
	unsigned long irq, page;

	raw_spin_lock_irqsave(&pool->lock, irq);
	page = kucomms_take_extent(&pool->extents, count);
	raw_spin_unlock_irqrestore(&pool->lock, irq);
	return page;
}

/**
 * kucomms_allocate - a buffer of a pool of the module
 * @pool: from kucomms_open_pool()
 * @length: bytes, at least 1
 *
 * It begins at a page. What is in it is what was there before, of the pool.
 *
 * Any context but NMI. Return: the
 * buffer, or an error pointer: -ENOBUFS when there is no room for it now (the
 * buffers_available callback is called when something was given back or freed),
 * -EMSGSIZE when there never is, -EINVAL; when there is no room and the user is gone,
 * what kucomms_send() says then.
 */
struct kucomms_buffer *kucomms_allocate(struct kucomms_pool *pool, u64 length)
{
	atomic_t *is_short = &pool->channel->pools->is_short;
	struct kucomms_buffer *buffer;
	unsigned long page;

	if (!length)
		return ERR_PTR(-EINVAL);
	if (length > (u64)pool->page_count << PAGE_SHIFT)
		return ERR_PTR(-EMSGSIZE);
	page = use(pool, pages_for(length));
	if (page == pool->page_count) {
		/*
		 * Then look again. Who frees comes with the lock before that,
		 * or sees this after it, in freed() or, when the runner looks
		 * for it, in kucomms_buffers_came_back().
		 */
		atomic_set(is_short, 1);
		page = use(pool, pages_for(length));
	}
	if (page == pool->page_count)
		/* Nobody gives back any more: a retry would never end. */
		return ERR_PTR(kucomms_channel_user_error(pool->channel) ?:
			       -ENOBUFS);
	refcount_inc(&pool->refs);
	buffer = &pool->buffers[page];
	buffer->pool = pool;
	buffer->length = length;
	buffer->callback = callback_of(pool->channel->pools);
	atomic_set(&buffer->owed.state, MINE);
	return buffer;
}
EXPORT_SYMBOL_GPL(kucomms_allocate);

/* ---- sending ------------------------------------------------------------- */

/* Nobody else sends or frees it from now on. Return: whether it can be sent here. */
static bool claim(struct kucomms_buffer *buffer,
		  const struct kucomms_channel *channel)
{
	if (!buffer || (!turn(buffer, MINE, MINE | CLAIMED) &&
			!turn(buffer, IN_HAND, IN_HAND | CLAIMED)))
		return false;
	/* Not before that: one that is AWAY has no pool. */
	if (buffer->pool->channel == channel)
		return true;
	atomic_andnot(CLAIMED, &buffer->owed.state);
	return false;
}

/* Nobody else sends or frees these from now on. */
int kucomms_buffers_claim(struct kucomms_channel *channel,
			  const struct kucomms_message *message)
{
	u32 i;

	if (!channel->pools)
		return -EOPNOTSUPP;
	if (message->buffer_count > KUCOMMS_CARRIED_MAX || !message->buffers)
		return -EINVAL;
	if (message->length > channel->ring_size)
		return -EMSGSIZE;
	for (i = 0; i < message->buffer_count; i++) {
		if (!claim(message->buffers[i], channel)) {
			kucomms_buffers_unclaim(message, i);
			return -EINVAL;
		}
	}
	return 0;
}

/* The message was not sent: the first @count of its buffers are what they were. */
void kucomms_buffers_unclaim(const struct kucomms_message *message, u32 count)
{
	while (count--)
		atomic_andnot(CLAIMED, &message->buffers[count]->owed.state);
}

static void fill_in(struct kucomms_carried *carried,
		    const struct kucomms_buffer *buffer)
{
	carried->pool = buffer->pool->number;
	carried->page = page_of(buffer);
	carried->length = buffer->length;
}

/*
 * There is room for a message: its buffers, which were claimed, are the user's. As
 * the only sender, or with the lock held. Return: 0, -ESTALE.
 */
int kucomms_hand_over(const struct kucomms_message *message,
		      struct kucomms_carried *list)
{
	struct kucomms_buffer *buffer;
	u32 i;

	/* The news that it was closed come after us, or have gone before. */
	for (i = 0; i < message->buffer_count; i++) {
		buffer = message->buffers[i];
		if (!is_the_users(buffer->pool) &&
		    READ_ONCE(buffer->pool->closed))
			return -ESTALE;
	}
	for (i = 0; i < message->buffer_count; i++) {
		buffer = message->buffers[i];
		buffer->pool->channel->pools->sent++;
		fill_in(&list[i], buffer);
		if (is_the_users(buffer->pool)) {
			drop(buffer);
		} else {
			/* pairs with atomic_read_acquire() in come_back() */
			atomic_set_release(&buffer->owed.state, OUT);
		}
	}
	return 0;
}

/* Where a frame of ours goes. As kucomms_ring_next(); it was asked for room. */
static int next_frame(struct kucomms_channel *channel, u32 length,
		      struct kucomms_frame **frame)
{
	int err = kucomms_ring_next(&channel->tx, length, frame);

	if (err == -EAGAIN &&
	    kucomms_ring_park_for_space(&channel->tx,
					kucomms_frame_span(length)))
		err = kucomms_ring_next(&channel->tx, length, frame);
	return err;
}

static void publish(struct kucomms_channel *channel,
		    struct kucomms_frame *frame, u32 length, u32 flags, u32 kind)
{
	frame->type = 0;
	frame->id = 0;
	frame->user_value = 0;
	kucomms_ring_publish(&channel->tx, frame, length, flags, kind);
}

/* Send the first news of all that wait. */
static int pay_news(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_pool_news *news;
	struct kucomms_frame *frame;
	struct kucomms_owed *owed;
	struct kucomms_pool *pool;
	bool opened;
	int err = next_frame(channel, sizeof(*news), &frame);

	if (err)
		return err;
	owed = llist_entry(pools->first_news, struct kucomms_owed, node);
	opened = atomic_read(&owed->state) == OPENED;
	pool = opened ? container_of(owed, struct kucomms_pool, opened) :
			container_of(owed, struct kucomms_pool, gone);
	WRITE_ONCE(pools->first_news, owed->node.next);
	news = (void *)(frame + 1);
	*news = (struct kucomms_pool_news) {
		.number = pool->number,
	};
	if (opened) {
		news->size = (u64)pool->page_count << PAGE_SHIFT;
		news->offset = offset_of(pool->number);
	}
	publish(channel, frame, sizeof(*news), 0, KUCOMMS_KIND_POOL);
	pool_put(pool);
	return 0;
}

/* How many are to be given back next: as many as there is room for. */
static u32 count_back(struct kucomms_channel *channel, u32 most)
{
	u64 fit = (channel->ring_size / 2 - KUCOMMS_HEADER_SIZE) /
		  sizeof(struct kucomms_carried);
	struct llist_node *node;
	u32 count = 0;

	most = min3(most, (u32)KUCOMMS_CARRIED_MAX, (u32)fit);
	for (node = channel->pools->first_back; node && count < most;
	     node = node->next)
		count++;
	return count;
}

/*
 * Give back the first of all that wait, as many as there is room for, and no more
 * than @most. Return: how many, or as kucomms_ring_next().
 */
static int pay_back(struct kucomms_channel *channel, u32 most)
{
	struct kucomms_pools *pools = channel->pools;
	u32 count = count_back(channel, most), i;
	struct kucomms_carried *list;
	struct kucomms_buffer *buffer;
	struct kucomms_frame *frame;
	int err;

	do {
		err = kucomms_ring_next(&channel->tx, count * sizeof(*list),
					&frame);
	} while (err == -EAGAIN && (count /= 2));
	if (err == -EAGAIN) {
		count = 1;
		err = next_frame(channel, sizeof(*list), &frame);
	}
	if (err)
		return err;
	list = (void *)(frame + 1);
	for (i = 0; i < count; i++) {
		buffer = llist_entry(pools->first_back, struct kucomms_buffer,
				     owed.node);
		WRITE_ONCE(pools->first_back, buffer->owed.node.next);
		fill_in(&list[i], buffer);
		drop(buffer);
	}
	publish(channel, frame, count * sizeof(*list), KUCOMMS_FLAG_NOTICE,
		kucomms_frame_kind(count));
	return count;
}

/* Whether anything waits to be told to the user. */
bool kucomms_owes(const struct kucomms_channel *channel)
{
	const struct kucomms_pools *pools = channel->pools;

	return pools && (READ_ONCE(pools->first_back) ||
			 READ_ONCE(pools->first_news) ||
			 !llist_empty(&pools->back) ||
			 !llist_empty(&pools->news));
}

/*
 * Tell the user what is owed. As the only sender, or with the lock held. Return: 0;
 * -EAGAIN when the ring is full, and the doorbell was asked for; -EINPROGRESS when
 * there is more; -EPROTO.
 */
int kucomms_pay(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	int frames, done, given = 0;

	for (frames = 0; frames < PAY_FRAMES && given < PAY_BUFFERS; frames++) {
		if (!pools->first_news) {
			/* In the order in which they were told; two of a pool. */
			WRITE_ONCE(pools->first_news,
				   llist_reverse_order(llist_del_all(&pools->news)));
		}
		if (!pools->first_back)
			WRITE_ONCE(pools->first_back,
				   llist_del_all(&pools->back));
		if (pools->first_news)
			done = pay_news(channel);
		else if (pools->first_back)
			done = pay_back(channel, PAY_BUFFERS - given);
		else
			return 0;
		if (done < 0)
			return done;
		given += done;
	}
	return kucomms_owes(channel) ? -EINPROGRESS : 0;
}

/* ---- receiving ----------------------------------------------------------- */

/*
 * These pages of a pool of the user are the kernel's now. Return: false when one was
 * already. In pieces, because they are as many as the user likes: only the runner,
 * which we are, makes pages used, and others make those free that are given back. So
 * what was free when we looked is free still.
 */
static bool use_these(struct kucomms_pool *pool, unsigned long first,
		      unsigned long end)
{
	unsigned long page, next, irq;
	bool used;

	for (page = first; page < end; page = next) {
		next = min(end, page + USE_PIECE);
		raw_spin_lock_irqsave(&pool->lock, irq);
		used = kucomms_find_used(&pool->used, page, next);
		raw_spin_unlock_irqrestore(&pool->lock, irq);
		if (used)
			return false;
	}
	raw_spin_lock_irqsave(&pool->lock, irq);
	kucomms_mark_used(&pool->used, first, end, true);
	raw_spin_unlock_irqrestore(&pool->lock, irq);
	return true;
}

/* One of a pool of the user is the module's now. */
static struct kucomms_buffer *accept(struct kucomms_channel *channel,
				     const struct kucomms_carried *carried)
{
	struct kucomms_pool *pool = find_pool(channel->pools, carried->pool);
	struct kucomms_buffer *buffer;
	unsigned long page;

	if (!pool || carried->page >= pool->page_count ||
	    !carried->length ||
	    carried->length >
	    (u64)(pool->page_count - carried->page) << PAGE_SHIFT)
		return NULL;
	page = array_index_nospec(carried->page, pool->page_count);
	if (is_over(pool) ||
	    !use_these(pool, page, page + pages_for(carried->length)))
		return NULL;
	/* Not let go of, see is_over(), and that is for us to do. */
	refcount_inc(&pool->refs);
	buffer = &pool->buffers[page];
	buffer->pool = pool;
	buffer->length = carried->length;
	return buffer;
}

/* One of a pool of the module comes back, exactly as it went. */
static struct kucomms_buffer *come_back(struct kucomms_channel *channel,
					const struct kucomms_carried *carried)
{
	struct kucomms_pool *pool = find_pool(channel->pools, carried->pool);
	struct kucomms_buffer *buffer;

	if (!pool || carried->page >= pool->page_count)
		return NULL;
	buffer = &pool->buffers[array_index_nospec(carried->page,
						   pool->page_count)];
	/* pairs with atomic_set_release() in kucomms_hand_over() */
	if (atomic_read_acquire(&buffer->owed.state) != OUT ||
	    carried->length != buffer->length)
		return NULL;
	return buffer;
}

static struct kucomms_carried read_carried(const struct kucomms_view *view,
					   u32 i)
{
	const struct kucomms_carried *list = (const void *)view->data;

	return (struct kucomms_carried) {
		.pool = READ_ONCE(list[i].pool),
		.page = READ_ONCE(list[i].page),
		.length = READ_ONCE(list[i].length),
	};
}

/* The user gives back what it was given. Return: 0, -EPROTO. */
int kucomms_buffers_returned(struct kucomms_channel *channel,
			     const struct kucomms_view *view)
{
	struct kucomms_carried carried;
	struct kucomms_buffer *buffer;
	u32 i;

	for (i = 0; i < view->buffers; i++) {
		carried = read_carried(view, i);
		buffer = carried.pool & 1 ? NULL : come_back(channel, &carried);
		if (!buffer)
			return -EPROTO;
		drop(buffer);
		atomic_set(&channel->pools->came_back, 1);
	}
	return 0;
}

/*
 * The buffers of the message at the front are in the module's hand, also when it
 * has had them there before and left the message for later. Return: 0, -EPROTO.
 */
int kucomms_buffers_received(struct kucomms_channel *channel,
			     const struct kucomms_view *view)
{
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_carried carried;
	struct kucomms_buffer *buffer;
	u32 i;

	if (pools->hand_count) {
		/* It is still there; the user may have made another of it. */
		if (pools->hand_at != channel->rx.position ||
		    pools->hand_count != view->buffers)
			return -EPROTO;
		return 0;
	}
	for (i = 0; i < view->buffers; i++) {
		carried = read_carried(view, i);
		if (carried.pool & 1)
			buffer = accept(channel, &carried);
		else
			buffer = come_back(channel, &carried);
		if (!buffer)
			return -EPROTO;
		atomic_set(&buffer->owed.state, IN_HAND);
		pools->hand[i] = buffer;
	}
	pools->received += view->buffers;
	pools->hand_at = channel->rx.position;
	pools->hand_count = view->buffers;
	return 0;
}

/* The callback leaves the message: what it has sent, freed or taken is gone. */
void kucomms_buffers_stay(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	u32 i;

	for (i = 0; i < pools->hand_count; i++)
		if (pools->hand[i] &&
		    atomic_read(&pools->hand[i]->owed.state) != IN_HAND)
			pools->hand[i] = NULL;
}

/* The callback has had the message: what it has not taken is given back. */
void kucomms_buffers_done(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;
	struct kucomms_buffer *buffer;
	u32 i;

	for (i = 0; i < pools->hand_count; i++) {
		buffer = pools->hand[i];
		/* What the callback has freed has no pool any more. */
		if (!buffer || !turn(buffer, IN_HAND, GOING))
			continue;
		if (is_the_users(buffer->pool)) {
			/* The runner, which we are, pays after this. */
			owe(buffer);
		} else {
			drop(buffer);
			atomic_set(&pools->came_back, 1);
		}
	}
	pools->hand_count = 0;
}

/* A callback of the channel that may allocate: each but those for its life. */
void kucomms_callback_begins(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;

	if (!pools)
		return;
	pools->callback++;
	WRITE_ONCE(pools->caller, current);
}

/* Return: whether kucomms_buffers_came_back() is to be asked. */
bool kucomms_callback_ended(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;

	if (!pools)
		return false;
	WRITE_ONCE(pools->caller, NULL);
	if (!pools->freed)
		return false;
	pools->freed = false;
	atomic_set(&pools->came_back, 1);
	return true;
}

/* Was a module short of buffers, and some are free again? */
bool kucomms_buffers_came_back(struct kucomms_channel *channel)
{
	struct kucomms_pools *pools = channel->pools;

	if (!atomic_read(&pools->came_back))
		return false;
	/* Before what is looked at: who frees later, sets it again. */
	atomic_xchg(&pools->came_back, 0);
	return atomic_read(&pools->is_short) &&
	       atomic_xchg(&pools->is_short, 0);
}

/**
 * kucomms_take_buffer - keep a buffer of a message beyond its callback
 * @channel: where it came from
 * @message: what the message callback was given, which this is called from
 * @i: which of its buffers
 *
 * It is the module's until it is given to kucomms_free_buffer(), or sent. When the
 * callback leaves the message for later (kucomms_retry()) it gets NULL in its place
 * the next time.
 *
 * Return: the buffer, or an error pointer: -EINVAL when there is none, or it was
 * taken, sent or freed already.
 */
struct kucomms_buffer *
kucomms_take_buffer(struct kucomms_channel *channel,
		    const struct kucomms_message *message, u32 i)
{
	struct kucomms_buffer *buffer;

	if (message != channel->in_hand || i >= message->buffer_count)
		return ERR_PTR(-EINVAL);
	buffer = message->buffers[i];
	if (!buffer || !turn(buffer, IN_HAND, MINE))
		return ERR_PTR(-EINVAL);
	return buffer;
}
EXPORT_SYMBOL_GPL(kucomms_take_buffer);
