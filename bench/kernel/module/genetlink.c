// SPDX-License-Identifier: GPL-2.0-only
/* Generic netlink: a family with one command, whose attribute is the message. */

#include <linux/module.h>
#include <net/genetlink.h>

#include "internal.h"

static int receive(struct sk_buff *skb, struct genl_info *info)
{
	u64 begin = kbench_cycles();
	const struct nlattr *bytes = info->attrs[KBENCH_GENL_BYTES];
	int err = 0;

	/* The attribute's bytes are at a multiple of eight: 16 + 4 + 4. */
	if (!bytes || !kbench_check(nla_data(bytes), kbench_run.first + kbench_run.timed))
		err = -EBADMSG;
	kbench_handled(kbench_cycles() - begin, err);
	return err;
}

static const struct nla_policy policy[] = {
	[KBENCH_GENL_BYTES] = NLA_POLICY_EXACT_LEN(KBENCH_SIZE),
};

static const struct genl_ops ops[] = {
	{
		.cmd = KBENCH_GENL_DATA,
		.flags = GENL_ADMIN_PERM,
		.doit = receive,
	},
};

static struct genl_family family = {
	.name = KBENCH_FAMILY,
	.version = 1,
	.maxattr = KBENCH_GENL_BYTES,
	.policy = policy,
	.module = THIS_MODULE,
	.ops = ops,
	.n_ops = ARRAY_SIZE(ops),
	.resv_start_op = KBENCH_GENL_DATA + 1,
	.parallel_ops = true,
};

static int send_one(u64 number)
{
	struct sk_buff *skb = genlmsg_new(nla_total_size(KBENCH_SIZE), GFP_KERNEL);
	void *header;

	if (!skb)
		return -ENOMEM;
	header = genlmsg_put(skb, 0, (u32)number, &family, 0, KBENCH_GENL_DATA);
	if (!header || nla_put(skb, KBENCH_GENL_BYTES, KBENCH_SIZE, kbench_buffer)) {
		nlmsg_free(skb);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, header);
	return genlmsg_unicast(&init_net, skb, kbench_run.start.port);
}

static int send_burst(u64 first, u32 count)
{
	u64 number;
	int err;

	for (number = first; number < first + count; number++) {
		kbench_fill(kbench_buffer, number, kbench_run.start.full);
		err = send_one(number);
		if (err)
			return err;
	}
	return 0;
}

static int init(void)
{
	return genl_register_family(&family);
}

static void exit_family(void)
{
	genl_unregister_family(&family);
}

const struct kbench_mechanism kbench_genetlink = {
	.init = init,
	.exit = exit_family,
	.send = send_burst,
	.inside = true,
};
