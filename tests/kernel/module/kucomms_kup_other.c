// SPDX-License-Identifier: GPL-2.0-only
/* The same once more: a second kernel module, with a device of its own. */

#include "kucomms_kup.c"
