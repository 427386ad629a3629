/*
 * What differs between the QEMU releases that these files compile against (10.0 to 11.1).
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VHOST_USER_NVME_COMPAT_H
#define VHOST_USER_NVME_COMPAT_H

/* Headers that moved. */
#if __has_include("system/memory.h")
#include "system/memory.h"
#else
#include "exec/memory.h"
#endif

#if __has_include("system/address-spaces.h")
#include "system/address-spaces.h"
#else
#include "exec/address-spaces.h"
#endif

#if __has_include("system/ramblock.h")
#include "system/ramblock.h"
#else
#include "exec/ramblock.h"
#endif

#if __has_include("hw/core/qdev-properties.h")
#include "hw/core/qdev-properties.h"
#else
#include "hw/qdev-properties.h"
#endif

/* From 10.1 on the data of a class_init function is const. */
#if QEMU_VERSION_MAJOR > 10 || (QEMU_VERSION_MAJOR == 10 && QEMU_VERSION_MINOR >= 1)
typedef const void *VuClassData;
#else
typedef void *VuClassData;
#endif

/* Routes of MSI messages to KVM: the transaction became accelerator neutral in 11.x. */
#if __has_include("accel/accel-route.h")
#include "system/accel-irq.h"
typedef AccelRouteChange VuRouteChange;
#define vu_route_begin() accel_irqchip_begin_route_changes()
#define vu_route_commit(c) accel_irqchip_commit_route_changes(c)
#else
#include "system/kvm.h"
typedef KVMRouteChange VuRouteChange;
#define vu_route_begin() kvm_irqchip_begin_route_changes(kvm_state)
#define vu_route_commit(c) kvm_irqchip_commit_route_changes(c)
#endif

#endif
