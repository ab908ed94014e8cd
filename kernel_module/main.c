// SPDX-License-Identifier: GPL-2.0-only
/* The module: its class and control files in sysfs, and its devices. */

#include "requirements.h"

#include <linux/cdev.h>
#include <linux/ctype.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/xarray.h>

#include "internal.h"

struct kucomms_alive kucomms_alive;
struct workqueue_struct *kucomms_workqueue;
DEFINE_MUTEX(kucomms_lock);	/* devices and endpoints, see internal.h */

static DEFINE_MUTEX(kucomms_names_lock);	/* create and remove */
static LIST_HEAD(kucomms_devices);
static DEFINE_XARRAY_ALLOC(kucomms_minors);
static u32 next_minor;
static dev_t first_number;
static struct cdev kucomms_cdev;

static struct class kucomms_class = {
	.name = "kucomms",
};

static struct device *control;

/* 0, -EINVAL or -ENAMETOOLONG for the name of a device, with the prefix. */
int kucomms_check_name(const char *name, size_t length)
{
	size_t i;

	if (length <= KUCOMMS_PREFIX_LENGTH ||
	    strncmp(name, KUCOMMS_PREFIX, KUCOMMS_PREFIX_LENGTH))
		return -EINVAL;
	for (i = KUCOMMS_PREFIX_LENGTH; i < length; i++)
		if (!isascii(name[i]) || (!isalnum(name[i]) && name[i] != '_'))
			return -EINVAL;
	return length > KUCOMMS_DEVICE_NAME_MAX ? -ENAMETOOLONG : 0;
}

/* The device of this name, or NULL. kucomms_lock is held. */
struct kucomms_device *kucomms_find_device(const char *name)
{
	struct kucomms_device *device;

	list_for_each_entry(device, &kucomms_devices, list)
		if (!strcmp(device->name, name))
			return device;
	return NULL;
}

/* kucomms_lock is held. */
struct kucomms_device *kucomms_device_by_minor(u32 minor)
{
	return xa_load(&kucomms_minors, minor);
}

/* ---- what a device tells in sysfs ---------------------------------------- */

static ssize_t endpoint_show(struct device *dev, struct device_attribute *attr,
			     char *buf)
{
	struct kucomms_device *device = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%d\n", !!READ_ONCE(device->endpoint));
}
static DEVICE_ATTR_RO(endpoint);

static ssize_t channels_show(struct device *dev, struct device_attribute *attr,
			     char *buf)
{
	struct kucomms_device *device = dev_get_drvdata(dev);

	return sysfs_emit(buf, "%d\n", atomic_read(&device->channels));
}
static DEVICE_ATTR_RO(channels);

static struct attribute *device_attrs[] = {
	&dev_attr_endpoint.attr,
	&dev_attr_channels.attr,
	NULL
};
ATTRIBUTE_GROUPS(device);

/* ---- making and removing devices ----------------------------------------- */

static int attach_endpoint(struct kucomms_device *device)
{
	struct kucomms_endpoint *endpoint;
	int err;

	/* Not the one that just went: somebody may be about to open that. */
	err = xa_alloc_cyclic(&kucomms_minors, &device->minor, device,
			      XA_LIMIT(0, MINORMASK), &next_minor, GFP_KERNEL);
	if (err < 0)
		return err == -EBUSY ? -ENOSPC : err;
	list_add_tail(&device->list, &kucomms_devices);
	list_for_each_entry(endpoint, &kucomms_endpoints, list) {
		if (!strcmp(endpoint->name, device->name)) {
			endpoint->device = device;
			WRITE_ONCE(device->endpoint, endpoint);
		}
	}
	return 0;
}

/* Nobody finds it any more. kucomms_lock is held. */
static void forget_device(struct kucomms_device *device)
{
	if (device->endpoint)
		device->endpoint->device = NULL;
	list_del(&device->list);
	xa_erase(&kucomms_minors, device->minor);
}

static void free_device(struct kucomms_device *device)
{
	kfree(device);
	atomic_dec(&kucomms_alive.devices);
}

static int create_device(const char *name)
{
	struct kucomms_device *device;
	struct device *dev;
	int err;

	device = kzalloc(sizeof(*device), GFP_KERNEL);
	if (!device)
		return -ENOMEM;
	strscpy(device->name, name, sizeof(device->name));
	init_waitqueue_head(&device->wait);
	atomic64_set(&device->news, 1);
	atomic_inc(&kucomms_alive.devices);
	/* Held to the end: who opens it waits until it is there for good. */
	mutex_lock(&kucomms_lock);
	err = kucomms_find_device(name) ? -EEXIST : attach_endpoint(device);
	if (!err) {
		dev = device_create_with_groups(&kucomms_class, NULL,
						MKDEV(MAJOR(first_number),
						      device->minor),
						device, device_groups, "%s",
						name);
		err = PTR_ERR_OR_ZERO(dev);
		if (err)
			forget_device(device);
	}
	mutex_unlock(&kucomms_lock);
	if (err)
		free_device(device);
	return err;
}

static int remove_device(const char *name)
{
	struct kucomms_device *device;
	int err = 0;

	mutex_lock(&kucomms_lock);
	device = kucomms_find_device(name);
	if (!device)
		err = -ENOENT;
	else if (device->opens || device->endpoint ||
		 atomic_read(&device->channels))
		err = -EBUSY;
	else
		forget_device(device);
	mutex_unlock(&kucomms_lock);
	if (err)
		return err;
	/* Waits for who reads its attributes, so not under the lock. */
	device_destroy(&kucomms_class,
		       MKDEV(MAJOR(first_number), device->minor));
	free_device(device);
	return 0;
}

static ssize_t with_name(const char *buf, size_t count,
			 int (*change)(const char *name))
{
	char name[KUCOMMS_DEVICE_NAME_MAX + 1];
	size_t length = count;
	int err;

	if (length && buf[length - 1] == '\n')
		length--;
	err = kucomms_check_name(buf, length);
	if (err)
		return err;
	memcpy(name, buf, length);
	name[length] = '\0';
	mutex_lock(&kucomms_names_lock);
	err = change(name);
	mutex_unlock(&kucomms_names_lock);
	return err ?: count;
}

static ssize_t create_device_store(struct device *dev,
				   struct device_attribute *attr,
				   const char *buf, size_t count)
{
	return with_name(buf, count, create_device);
}
static DEVICE_ATTR_WO(create_device);

static ssize_t remove_device_store(struct device *dev,
				   struct device_attribute *attr,
				   const char *buf, size_t count)
{
	return with_name(buf, count, remove_device);
}
static DEVICE_ATTR_WO(remove_device);

static ssize_t abi_version_show(struct device *dev,
				struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%d\n", KUCOMMS_ABI_VERSION);
}
static DEVICE_ATTR_RO(abi_version);

static struct attribute *control_attrs[] = {
	&dev_attr_create_device.attr,
	&dev_attr_remove_device.attr,
	&dev_attr_abi_version.attr,
	NULL
};
ATTRIBUTE_GROUPS(control);

/* ---- the module ---------------------------------------------------------- */

static int __init kucomms_init(void)
{
	int err;

	kucomms_workqueue = alloc_workqueue("kucomms",
					    WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!kucomms_workqueue)
		return -ENOMEM;
	kucomms_debugfs_init();
	err = class_register(&kucomms_class);
	if (err)
		goto err_workqueue;
	err = alloc_chrdev_region(&first_number, 0, MINORMASK + 1, "kucomms");
	if (err)
		goto err_class;
	cdev_init(&kucomms_cdev, &kucomms_fops);
	kucomms_cdev.owner = THIS_MODULE;
	err = cdev_add(&kucomms_cdev, first_number, MINORMASK + 1);
	if (err)
		goto err_region;
	control = device_create_with_groups(&kucomms_class, NULL, MKDEV(0, 0),
					    NULL, control_groups, "kucomms");
	if (IS_ERR(control)) {
		err = PTR_ERR(control);
		goto err_cdev;
	}
	return 0;

err_cdev:
	cdev_del(&kucomms_cdev);
err_region:
	unregister_chrdev_region(first_number, MINORMASK + 1);
err_class:
	class_unregister(&kucomms_class);
err_workqueue:
	kucomms_debugfs_exit();
	destroy_workqueue(kucomms_workqueue);
	return err;
}

static void __exit kucomms_exit(void)
{
	struct kucomms_device *device, *next;

	/* No open file and no user module is left, or we would not be here. */
	device_unregister(control);
	list_for_each_entry_safe(device, next, &kucomms_devices, list) {
		mutex_lock(&kucomms_lock);
		forget_device(device);
		mutex_unlock(&kucomms_lock);
		device_destroy(&kucomms_class,
			       MKDEV(MAJOR(first_number), device->minor));
		free_device(device);
	}
	cdev_del(&kucomms_cdev);
	unregister_chrdev_region(first_number, MINORMASK + 1);
	class_unregister(&kucomms_class);
	/* Channels that were let go a moment ago are freed there. */
	destroy_workqueue(kucomms_workqueue);
	kucomms_debugfs_exit();
	xa_destroy(&kucomms_minors);
}

module_init(kucomms_init);
module_exit(kucomms_exit);

MODULE_AUTHOR("The kucomms authors");
MODULE_DESCRIPTION("Message endpoints between kernel modules and user space");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
