// SPDX-License-Identifier: GPL-2.0-only
/*
 * A device whose memory both sides map: for each direction an array of slots,
 * each with a flag that says whose it is. Who waits polls the flag.
 */

#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

#include "internal.h"

static struct kbench_slot *slots;	/* to the kernel, then to the user */

static int device_mmap(struct file *file, struct vm_area_struct *vma)
{
	return remap_vmalloc_range(vma, slots, vma->vm_pgoff);
}

static const struct file_operations fops = {
	.owner	= THIS_MODULE,
	.mmap	= device_mmap,
};

static struct miscdevice device = {
	.minor	= MISC_DYNAMIC_MINOR,
	.name	= KBENCH_SHARED,
	.fops	= &fops,
	.mode	= 0600,
};

static int send_burst(u64 first, u32 count)
{
	struct kbench_slot *slot;
	u64 number;

	for (number = first; number < first + count; number++) {
		slot = &slots[KBENCH_SLOTS + number % KBENCH_SLOTS];
		/* pairs with the user's release of the flag */
		if (smp_load_acquire(&slot->flag))
			return -ENOBUFS;
		kbench_fill(slot->words, number, kbench_run.start.full);
		/* pairs with the user's acquire of the flag */
		smp_store_release(&slot->flag, number + 1);
	}
	return 0;
}

static int receive_one(u64 number)
{
	struct kbench_slot *slot = &slots[number % KBENCH_SLOTS];

	/* pairs with the user's release of the flag */
	if (smp_load_acquire(&slot->flag) != number + 1 || !kbench_check(slot->words, number))
		return -EBADMSG;
	/* pairs with the user's acquire of the flag */
	smp_store_release(&slot->flag, 0);
	return 0;
}

static int receive_burst(u64 first, u32 count)
{
	u64 number;
	int err;

	for (number = first; number < first + count; number++) {
		err = receive_one(number);
		if (err)
			return err;
	}
	return 0;
}

static int receive_first(u64 number)
{
	const struct kbench_slot *slot = &slots[number % KBENCH_SLOTS];

	while (!READ_ONCE(slot->flag)) {
		if (READ_ONCE(kbench_run.over))
			return -EINTR;
		cpu_relax();
		cond_resched();
	}
	return receive_one(number);
}

static int start(const struct kbench_start *start)
{
	int i;

	for (i = 0; i < 2 * KBENCH_SLOTS; i++) {
		kbench_fill(slots[i].words, i, true);
		slots[i].flag = 0;
	}
	return 0;
}

static int init(void)
{
	int err;

	slots = vmalloc_user(PAGE_ALIGN(KBENCH_SHARED_SIZE));
	if (!slots)
		return -ENOMEM;
	err = misc_register(&device);
	if (err)
		vfree(slots);
	return err;
}

static void exit_device(void)
{
	misc_deregister(&device);
	vfree(slots);
}

const struct kbench_mechanism kbench_mmap = {
	.init = init,
	.exit = exit_device,
	.start = start,
	.send = send_burst,
	.first = receive_first,
	.receive = receive_burst,
	.spins = true,
};
