/*
 * The PCI function of an NVMe controller that lives in another process: configuration space, MSI-X and a window for
 * BAR0. The controller itself is the vhost-user-nvme daemon's; docs/VHOST_USER.md says what each message means.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include "hw/pci/msix.h"
#include "hw/pci/pcie.h"
#include "migration/blocker.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "system/system.h"
#include "vhost-user-nvme.h"

#define NVME_BAR_MIN (16 * KiB)

#define MSIX_BAR 4
#define PM_CAP 0x60
#define EXPRESS_CAP 0x80

/* ------------------------------------------------------------------ BAR0 */

static uint64_t nvme_bar_read(void *opaque, hwaddr addr, unsigned size)
{
    VhostUserNvme *n = opaque;

    if (addr >= NVME_DOORBELLS + n->window->size) {
        return 0;
    }
    if (addr >= NVME_DOORBELLS && n->link != NVME_LINK_LOST) {
        return ldn_le_p(n->window->start + (addr - NVME_DOORBELLS), size);
    }
    if (addr >= NVME_FRONTEND_PAGE && addr < NVME_DOORBELLS) {
        return 0;
    }
    return nvme_regs_read(n, addr, size);
}

/* After the doorbell is stored. The daemon says that it sleeps, then reads the doorbell: one of us sees the other. */
static bool daemon_awake(VhostUserNvme *n, hwaddr vring)
{
    if (!n->side) {
        return false;
    }
    smp_mb();
    return qatomic_read(&n->side[vring].awake) != 0;
}

static void ring_doorbell(VhostUserNvme *n, hwaddr offset, uint32_t value)
{
    uint32_t *doorbell = n->window->start + offset;
    hwaddr vring = offset >> n->stride_shift;
    bool is_sq = !(offset & (1u << (n->stride_shift - 1)));
    bool watch = vring < n->n_vrings && is_sq && nvme_watch_begin(&n->vrings[vring]);

    qatomic_set(doorbell, cpu_to_le32(value));
    /* Also if nobody is there: the next daemon finds the kick in the eventfd. */
    if (vring < n->n_vrings && !daemon_awake(n, vring)) {
        event_notifier_set(&n->vrings[vring].kick);
    }
    if (watch) {
        nvme_watch_end(&n->vrings[vring]);
    }
}

static void nvme_bar_write(void *opaque, hwaddr addr, uint64_t value, unsigned size)
{
    VhostUserNvme *n = opaque;

    if (addr < NVME_FRONTEND_PAGE) {
        nvme_regs_write(n, addr, value, size);
    } else if (addr >= NVME_DOORBELLS && addr < NVME_DOORBELLS + n->window->size && size == 4) {
        ring_doorbell(n, addr - NVME_DOORBELLS, value);
    }
}

/* Naturally aligned accesses only: the memory core splits or drops others. */
static const MemoryRegionOps nvme_bar_ops = {
    .read = nvme_bar_read,
    .write = nvme_bar_write,
    .endianness = DEVICE_LITTLE_ENDIAN,
    .valid = { .min_access_size = 1, .max_access_size = 8 },
    .impl = { .min_access_size = 1, .max_access_size = 8 },
};

/* ------------------------------------------------------------------ configuration space */

static void nvme_config_write(PCIDevice *pci, uint32_t addr, uint32_t value, int len)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);

    pci_default_write_config(pci, addr, value, len);
    pcie_cap_flr_write_config(pci, addr, value, len);
    if (msix_enabled(pci)) {
        nvme_vectors_to_kvm(n);
    } else {
        nvme_vectors_from_kvm(n);
    }
}

/* ------------------------------------------------------------------ reset */

static void nvme_reset(DeviceState *dev)
{
    VhostUserNvme *n = VHOST_USER_NVME(dev);
    unsigned i;

    nvme_vectors_from_kvm(n);
    nvme_link_settle(n);
    if (n->link == NVME_LINK_UP) {
        nvme_link_reset(n);
    }
    /* A daemon that is not there learns of it when it comes: nothing of the device was used. */
    nvme_regs_reset(n);
    nvme_window_show(n, false);
    for (i = 0; i < n->n_vrings; i++) {
        event_notifier_test_and_clear(&n->vrings[i].call);
    }
}

/* ------------------------------------------------------------------ realize */

static bool make_pci(VhostUserNvme *n, Error **errp)
{
    PCIDevice *pci = PCI_DEVICE(n);
    const NvmeShape *shape = &n->shape;
    uint64_t bar_size = MAX(NVME_BAR_MIN, pow2ceil(NVME_DOORBELLS + n->window->size));
    unsigned i;

    if (!nvme_window_reserve(n)) {
        error_setg_errno(errp, errno, "no addresses for the doorbell window");
        return false;
    }
    pci_config_set_vendor_id(pci->config, shape->vendor);
    pci_config_set_device_id(pci->config, shape->device);
    pci_set_word(pci->config + PCI_SUBSYSTEM_VENDOR_ID, shape->subsystem_vendor);
    pci_set_word(pci->config + PCI_SUBSYSTEM_ID, shape->subsystem);
    pci_config_set_revision(pci->config, shape->revision);
    pci_config_set_prog_interface(pci->config, 2);

    if (pci_pm_init(pci, PM_CAP, errp) < 0) {
        return false;
    }
    pci_set_word(pci->config + PM_CAP + PCI_PM_PMC, PCI_PM_CAP_VER_1_2);
    pci_set_word(pci->config + PM_CAP + PCI_PM_CTRL, PCI_PM_CTRL_NO_SOFT_RESET);
    pci_set_word(pci->wmask + PM_CAP + PCI_PM_CTRL, PCI_PM_CTRL_STATE_MASK);
    if (pcie_endpoint_cap_init(pci, EXPRESS_CAP) < 0) {
        error_setg(errp, "no room for the PCI Express capability");
        return false;
    }
    pcie_cap_flr_init(pci);

    memory_region_init_io(&n->bar, OBJECT(n), &nvme_bar_ops, n, "vhost-user-nvme", bar_size);
    memory_region_init_ram_device_ptr(&n->doorbells, OBJECT(n), "vhost-user-nvme-doorbells", n->window->size,
                                      n->window->start);
    memory_region_set_enabled(&n->doorbells, false);
    memory_region_add_subregion_overlap(&n->bar, NVME_DOORBELLS, &n->doorbells, 1);
    pci_register_bar(pci, 0, PCI_BASE_ADDRESS_SPACE_MEMORY | PCI_BASE_ADDRESS_MEM_TYPE_64, &n->bar);

    if (msix_init_exclusive_bar(pci, n->n_vrings, MSIX_BAR, errp) < 0) {
        return false;
    }
    n->msix_made = true;
    for (i = 0; i < n->n_vrings; i++) {
        msix_vector_use(pci, i);
    }
    return true;
}

/* Undoes what there is of nvme_realize. */
static void nvme_undo(VhostUserNvme *n)
{
    PCIDevice *pci = PCI_DEVICE(n);

    nvme_vectors_from_kvm(n);
    nvme_link_close(n);
    nvme_vrings_cleanup(n);
    if (n->msix_made) {
        msix_uninit_exclusive_bar(pci);
        n->msix_made = false;
    }
    if (n->migration_blocker) {
        migrate_del_blocker(&n->migration_blocker);
    }
    g_free(n->name);
    n->name = NULL;
}

static void nvme_realize(PCIDevice *pci, Error **errp)
{
    ERRP_GUARD();
    VhostUserNvme *n = VHOST_USER_NVME(pci);
    bool ok;

    if (n->window) {
        error_setg(errp, "a device that could not be realized cannot be tried again: make a new one");
        return;
    }
    if (!n->socket || !*n->socket) {
        error_setg(errp, "'socket' is missing: the path of a vhost-user-nvme socket");
        return;
    }
    if (n->reply_timeout == 0) {
        error_setg(errp, "'reply-timeout' must be at least 1 ms");
        return;
    }
    error_setg(&n->migration_blocker, "vhost-user-nvme: the controller's state lives in the daemon, "
               "which cannot hand it to another host yet");
    if (migrate_add_blocker(&n->migration_blocker, errp) < 0) {
        return;
    }
    n->name = g_strdup_printf("%s %s", TYPE_VHOST_USER_NVME, DEVICE(n)->id ? DEVICE(n)->id : n->socket);
    n->window = g_new0(NvmeWindow, 1);
    n->window->fd = -1;
    qemu_uuid_generate(&n->instance_id);

    ok = n->wait ? nvme_link_open(n, errp) : nvme_link_assume(n, errp);
    if (ok) {
        n->n_vrings = n->shape.n_vrings;
        n->window->size = n->shape.window_size;
        n->stride_shift = 3 + ((n->shape.cap >> 32) & 0xf); /* CAP.DSTRD */
        nvme_regs_init(n, n->shape.cap);
        ok = nvme_vrings_init(n, errp) && make_pci(n, errp) &&
             (n->wait ? nvme_link_finish(n, errp) : nvme_link_later(n, errp));
    }
    if (!ok) {
        if (n->client) {
            error_prepend(errp, "'%s': ", n->socket);
        }
        nvme_undo(n);
    }
}

static void nvme_exit(PCIDevice *pci)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);

    /* When this is answered nothing is on its way into the guest's memory any more. */
    nvme_link_settle(n);
    if (n->link == NVME_LINK_UP) {
        vu_client_reset(n->client);
    }
    nvme_window_show(n, false);
    nvme_undo(n);
    pcie_cap_exit(pci);
}

/* ------------------------------------------------------------------ type */

static void nvme_instance_init(Object *obj)
{
    VhostUserNvme *n = VHOST_USER_NVME(obj);

    /* The path under which firmware looks for the boot disk: that of namespace 1, as for QEMU's own nvme. */
    device_add_bootindex_property(obj, &n->bootindex, "bootindex", "/namespace@1,0", DEVICE(obj));
    object_property_set_description(obj, "bootindex", "place in the boot order; the lowest boots first");
}

static void nvme_instance_finalize(Object *obj)
{
    VhostUserNvme *n = VHOST_USER_NVME(obj);

    nvme_window_free(n->window);
}

static const Property nvme_properties[] = {
    DEFINE_PROP_STRING("socket", VhostUserNvme, socket),
    DEFINE_PROP_BOOL("wait", VhostUserNvme, wait, true),
    DEFINE_PROP_UINT32("connect-timeout", VhostUserNvme, connect_timeout, 30000),
    DEFINE_PROP_UINT32("reply-timeout", VhostUserNvme, reply_timeout, 10000),
    DEFINE_PROP_UINT32("reconnect-delay", VhostUserNvme, reconnect_delay, 10),
    DEFINE_PROP_UINT16("queues", VhostUserNvme, queues, 33),
    DEFINE_PROP_UINT32("queue-entries", VhostUserNvme, queue_entries, 1024),
    DEFINE_PROP_UINT8("doorbell-stride", VhostUserNvme, doorbell_stride, 3),
    DEFINE_PROP_UINT32("watch-us", VhostUserNvme, watch_us, 30),
};

static void nvme_class_init(ObjectClass *oc, VuClassData data)
{
    DeviceClass *dc = DEVICE_CLASS(oc);
    PCIDeviceClass *pc = PCI_DEVICE_CLASS(oc);

    pc->realize = nvme_realize;
    pc->exit = nvme_exit;
    pc->config_write = nvme_config_write;
    pc->class_id = PCI_CLASS_STORAGE_EXPRESS;
    /* The daemon names vendor and device. */
    dc->desc = "NVMe controller of a vhost-user-nvme daemon";
    /* No vmsd: unmigratable, and the migration blocker says why (a vmsd that says so would hide the reason). */
    set_bit(DEVICE_CATEGORY_STORAGE, dc->categories);
    device_class_set_legacy_reset(dc, nvme_reset);
    device_class_set_props(dc, nvme_properties);
    object_class_property_set_description(oc, "socket", "path of the daemon's socket");
    object_class_property_set_description(oc, "wait",
                                          "off: the machine starts without the daemon, and the guest waits for it");
    object_class_property_set_description(oc, "connect-timeout",
                                          "how long to wait for the daemon to listen and to take this front-end, in ms");
    object_class_property_set_description(oc, "reconnect-delay",
                                          "when the daemon is gone: the shortest time between two attempts to reach it, in ms; "
                                          "0 = none is made");
    object_class_property_set_description(oc, "queues", "with wait=off: what the daemon's 'queues' is");
    object_class_property_set_description(oc, "queue-entries", "with wait=off: at most what the daemon's 'queue-entries' is");
    object_class_property_set_description(oc, "doorbell-stride", "with wait=off: what the daemon's 'doorbell-stride' is");
    object_class_property_set_description(oc, "reply-timeout",
                                          "how long an answer of the daemon may take before it counts as gone, in ms");
    object_class_property_set_description(oc, "watch-us",
                                          "without irqfd: how long a CPU that rings looks for the interrupt, in us; 0 = never");
}

static const TypeInfo nvme_type = {
    .name = TYPE_VHOST_USER_NVME,
    .parent = TYPE_PCI_DEVICE,
    .instance_size = sizeof(VhostUserNvme),
    .instance_init = nvme_instance_init,
    .instance_finalize = nvme_instance_finalize,
    .class_init = nvme_class_init,
    .interfaces = (InterfaceInfo[]) { { INTERFACE_PCIE_DEVICE }, { } },
};

static void nvme_register(void)
{
    type_register_static(&nvme_type);
}

type_init(nvme_register)
