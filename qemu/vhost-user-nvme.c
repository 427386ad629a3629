/*
 * The PCI function of an NVMe controller that lives in another process: configuration space, MSI-X and a window for
 * BAR0. The controller itself is the vhost-user-nvme daemon's; docs/VHOST_USER.md says what each message means.
 *
 * Copyright (c) 2026 the vhost-user-nvme authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"

#include <sys/mman.h>

#include "hw/core/cpu.h"
#include "hw/pci/msix.h"
#include "hw/pci/pcie.h"
#include "migration/blocker.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/units.h"
#include "system/kvm.h"
#include "system/system.h"
#include "system/tcg.h"
#include "vhost-user-nvme.h"

/* BAR0: registers, of which the end is the front-end's page, then the doorbell window. */
#define NVME_REG_CAP 0x000
#define NVME_FRONTEND_PAGE 0xf00
#define NVME_DOORBELLS 0x1000
#define NVME_BAR_MIN (16 * KiB)

/* The front-end page. */
#define PAGE_MAGIC 0x454d564eu /* "NVME" */
#define PAGE_VERSION 1
#define PAGE_INSTANCE_ID 0xf20

typedef struct QEMU_PACKED FrontendPage {
    uint32_t magic;
    uint32_t version;
    uint32_t window_size;
    uint16_t vrings;
    uint16_t reserved;
    uint16_t vendor;
    uint16_t device;
    uint16_t subsystem_vendor;
    uint16_t subsystem;
    uint8_t revision;
    uint8_t reserved2[3];
    uint32_t side_offset; /* of the side words in the window's file; 0 = none */
} FrontendPage;
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, vendor) != 0x10);
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, revision) != 0x18);
QEMU_BUILD_BUG_ON(offsetof(FrontendPage, side_offset) != 0x1c);

/* CAP.DSTRD is a power of two from 4 bytes to 128 KiB; more than the largest window is nobody's. */
#define MAX_WINDOW (MAX_VRINGS * (8u << 15))

#define MSIX_BAR 4
#define PM_CAP 0x60
#define EXPRESS_CAP 0x80

/* Shared memory regions of the back-end. */
#define SHM_FRONTEND 0  /* the doorbell window as this process sees it */
#define SHM_GUEST 1     /* the same, as the guest sees it */

/* ------------------------------------------------------------------ doorbell window */

static void window_unmap(NvmeWindow *w)
{
    munmap(w->start, w->size);
    g_free(w);
}

/* Puts nobody's memory where the daemon's file was: late accesses end there. */
static bool window_reserve(NvmeWindow *w)
{
    void *p = mmap(w->start, w->size, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | (w->start ? MAP_FIXED : 0), -1, 0);

    if (p == MAP_FAILED) {
        return false;
    }
    w->start = p;
    return true;
}

static bool window_range_ok(VhostUserNvme *n, const VuMapping *m)
{
    return m->shm_offset == 0 && m->len == n->window->size;
}

/* True if the descriptor is a file that holds the range; one that does not would kill this process with SIGBUS. */
static bool file_holds(int fd, uint64_t offset, uint64_t len)
{
    struct stat st;

    return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && offset <= INT64_MAX && len <= INT64_MAX - offset &&
           offset + len <= (uint64_t)st.st_size;
}

static size_t side_size(VhostUserNvme *n)
{
    return ROUND_UP(n->n_vrings * sizeof(NvmeSideWords), qemu_real_host_page_size());
}

/* Optional: without them every ring kicks, and every interrupt comes through its eventfd. */
static void side_map(VhostUserNvme *n, const VuMapping *m, int fd)
{
    uint64_t offset = m->fd_offset + n->side_offset;
    unsigned i;
    void *p;

    if (!n->side_offset || !n->watch_us || kvm_msi_via_irqfd_enabled() || !file_holds(fd, offset, side_size(n))) {
        return;
    }
    p = mmap(NULL, side_size(n), PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    if (p == MAP_FAILED) {
        return;
    }
    n->side = p;
    for (i = 0; i < n->n_vrings; i++) {
        qatomic_set(&n->side[i].attentive, cpu_to_le32(1));
    }
}

static void side_unmap(VhostUserNvme *n)
{
    if (n->side) {
        munmap(n->side, side_size(n));
        n->side = NULL;
    }
}

static void show_doorbells(VhostUserNvme *n, bool on)
{
    if (n->doorbells.enabled != on) {
        memory_region_set_enabled(&n->doorbells, on);
    }
}

static VuAnswer nvme_shmem_map(void *opaque, const VuMapping *m, int fd)
{
    VhostUserNvme *n = opaque;

    if (!window_range_ok(n, m) || !m->writable || (m->shmid == SHM_GUEST) != n->window_mapped) {
        return VU_ANSWER_FAILED;
    }
    switch (m->shmid) {
    case SHM_FRONTEND:
        if (!file_holds(fd, m->fd_offset, m->len) ||
            mmap(n->window->start, n->window->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
                 m->fd_offset) == MAP_FAILED) {
            return VU_ANSWER_FAILED;
        }
        side_map(n, m, fd);
        n->window_mapped = true;
        return VU_ANSWER_OK;
    case SHM_GUEST:
        /* The same file by contract, so it is there already and needs to be shown only. */
        show_doorbells(n, true);
        return VU_ANSWER_OK;
    default:
        return VU_ANSWER_FAILED;
    }
}

static void fence_drop(NvmeFence *f)
{
    VhostUserNvme *n = f->n;

    if (--f->left) {
        return;
    }
    if (n->fence == f) {
        n->fence = NULL;
        vu_client_answer(n->client, true);
    }
    g_free(f);
    object_unref(OBJECT(n));
}

static void fence_on_cpu(CPUState *cpu, run_on_cpu_data data)
{
    fence_drop(data.host_ptr);
}

static VuAnswer nvme_shmem_unmap(void *opaque, const VuMapping *m)
{
    VhostUserNvme *n = opaque;
    NvmeFence *f;
    CPUState *cpu;

    if (m->shmid != SHM_GUEST || !window_range_ok(n, m)) {
        return VU_ANSWER_FAILED;
    }
    show_doorbells(n, false);
    if (!tcg_enabled()) {
        /* KVM takes the memory slot away before it returns. */
        return VU_ANSWER_OK;
    }
    /*
     * TCG has queued a flush of the translations on every CPU. What is queued after it runs after it, between two
     * blocks of guest code; nothing waits here, so no CPU can hold it up but by not running, and then it stores nothing.
     */
    f = g_new0(NvmeFence, 1);
    f->n = n;
    object_ref(OBJECT(n));
    f->left = 1;
    n->fence = f;
    CPU_FOREACH(cpu) {
        f->left++;
        async_run_on_cpu(cpu, fence_on_cpu, RUN_ON_CPU_HOST_PTR(f));
    }
    f->left--;
    if (!f->left) {
        n->fence = NULL;
        g_free(f);
        object_unref(OBJECT(n));
        return VU_ANSWER_OK;
    }
    return VU_ANSWER_LATER;
}

/* ------------------------------------------------------------------ BAR0 */

static uint64_t all_ones(unsigned size)
{
    return size < 8 ? (1ull << (size * 8)) - 1 : UINT64_MAX;
}

static uint64_t nvme_bar_read(void *opaque, hwaddr addr, unsigned size)
{
    VhostUserNvme *n = opaque;
    uint8_t buf[8];

    if (addr >= NVME_DOORBELLS + n->window->size) {
        return 0;
    }
    if (addr >= NVME_FRONTEND_PAGE && addr < NVME_DOORBELLS) {
        return 0;
    }
    if (!vu_client_alive(n->client)) {
        /* What a PCI function that was pulled out reads. */
        return all_ones(size);
    }
    if (addr >= NVME_DOORBELLS) {
        return ldn_le_p(n->window->start + (addr - NVME_DOORBELLS), size);
    }
    if (vu_client_config_read(n->client, addr, buf, size) != VU_OK) {
        return all_ones(size);
    }
    return ldn_le_p(buf, size);
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
    uint8_t buf[8];

    if (!vu_client_alive(n->client)) {
        return;
    }
    if (addr < NVME_FRONTEND_PAGE) {
        stn_le_p(buf, size, value);
        vu_client_config_write(n->client, addr, buf, size);
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

/* ------------------------------------------------------------------ reset, and the end of a connection */

static bool enable_vrings(VhostUserNvme *n)
{
    unsigned i;

    for (i = 0; i < n->n_vrings; i++) {
        if (vu_client_vring_enable(n->client, i, true) != VU_OK) {
            return false;
        }
    }
    return true;
}

static void nvme_reset(DeviceState *dev)
{
    VhostUserNvme *n = VHOST_USER_NVME(dev);
    unsigned i;

    nvme_vectors_from_kvm(n);
    if (vu_client_alive(n->client) && vu_client_reset(n->client) == VU_OK) {
        /* A wish for mapped mode from before the reset is granted and forgotten. */
        vu_client_serve_pending(n->client);
        enable_vrings(n);
    }
    show_doorbells(n, false);
    for (i = 0; i < n->n_vrings; i++) {
        event_notifier_test_and_clear(&n->vrings[i].call);
    }
}

/* May be called from inside a memory transaction: what changes the map waits. */
static void nvme_gone(void *opaque, Error *reason)
{
    VhostUserNvme *n = opaque;

    warn_reportf_err(reason, "%s: the disk is gone, its registers read as all ones: ", n->name);
    n->fence = NULL;
    n->window_mapped = false;
    if (n->memory) {
        vu_memory_detach(n->memory);
    }
    qemu_bh_schedule(n->gone_bh);
}

static void nvme_gone_bh(void *opaque)
{
    VhostUserNvme *n = opaque;

    show_doorbells(n, false);
    side_unmap(n);
    if (!window_reserve(n->window)) {
        warn_report("%s: cannot let go of the doorbell window: %s", n->name, strerror(errno));
    }
}

static const VuClientOps nvme_client_ops = {
    .shmem_map = nvme_shmem_map,
    .shmem_unmap = nvme_shmem_unmap,
    .gone = nvme_gone,
};

/* ------------------------------------------------------------------ realize */

/* Reads what the daemon says of itself, and believes what is possible. */
static bool read_shape(VhostUserNvme *n, FrontendPage *page, Error **errp)
{
    g_autofree VuShmemSizes *shmem = g_new0(VuShmemSizes, 1);
    uint8_t cap[8];
    uint64_t queues;
    VuResult r;

    r = vu_client_queue_num(n->client, &queues);
    if (r == VU_OK) {
        r = vu_client_shmem_sizes(n->client, shmem);
    }
    if (r == VU_OK) {
        r = vu_client_config_read(n->client, NVME_FRONTEND_PAGE, page, sizeof(*page));
    }
    if (r == VU_OK) {
        r = vu_client_config_read(n->client, NVME_REG_CAP, cap, sizeof(cap));
    }
    if (r == VU_GONE) {
        error_propagate(errp, vu_client_take_error(n->client));
        return false;
    }
    if (r != VU_OK || le32_to_cpu(page->magic) != PAGE_MAGIC) {
        error_setg(errp, "the back-end is no NVMe controller");
        return false;
    }
    if (le32_to_cpu(page->version) != PAGE_VERSION) {
        error_setg(errp, "the daemon speaks version %u of the front-end page, this QEMU version %u",
                   le32_to_cpu(page->version), PAGE_VERSION);
        return false;
    }
    n->n_vrings = le16_to_cpu(page->vrings);
    if (n->n_vrings < 1 || n->n_vrings > MAX_VRINGS || queues != n->n_vrings) {
        error_setg(errp, "the daemon has %u (or %" PRIu64 ") queue pairs, not 1 to %u", n->n_vrings, queues,
                   MAX_VRINGS);
        return false;
    }
    n->side_offset = le32_to_cpu(page->side_offset);
    if (n->side_offset % qemu_real_host_page_size()) {
        error_setg(errp, "the daemon's side words at 0x%x do not begin a page", n->side_offset);
        return false;
    }
    n->stride_shift = 3 + (ldl_le_p(cap + 4) & 0xf); /* CAP.DSTRD: bits 35:32 */
    n->window->size = le32_to_cpu(page->window_size);
    if (n->window->size < 4 * KiB || n->window->size > MAX_WINDOW || n->window->size % (4 * KiB) ||
        n->window->size % qemu_real_host_page_size()) {
        error_setg(errp, "the daemon's doorbell window of 0x%zx bytes is not a multiple of 4 KiB up to 0x%x",
                   n->window->size, MAX_WINDOW);
        return false;
    }
    if (shmem->n != 2 || shmem->size[SHM_FRONTEND] != n->window->size ||
        shmem->size[SHM_GUEST] != n->window->size) {
        error_setg(errp, "the daemon's shared memory regions are not two of the doorbell window's size");
        return false;
    }
    return true;
}

static bool make_pci(VhostUserNvme *n, const FrontendPage *page, Error **errp)
{
    PCIDevice *pci = PCI_DEVICE(n);
    uint64_t bar_size = MAX(NVME_BAR_MIN, pow2ceil(NVME_DOORBELLS + n->window->size));
    unsigned i;

    if (!window_reserve(n->window)) {
        error_setg_errno(errp, errno, "no addresses for the doorbell window");
        return false;
    }
    pci_config_set_vendor_id(pci->config, le16_to_cpu(page->vendor));
    pci_config_set_device_id(pci->config, le16_to_cpu(page->device));
    pci_set_word(pci->config + PCI_SUBSYSTEM_VENDOR_ID, le16_to_cpu(page->subsystem_vendor));
    pci_set_word(pci->config + PCI_SUBSYSTEM_ID, le16_to_cpu(page->subsystem));
    pci_config_set_revision(pci->config, page->revision);
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

/* Steps 7 to 10 of the connection. */
static bool attach(VhostUserNvme *n, Error **errp)
{
    unsigned i;

    if (vu_client_config_write(n->client, PAGE_INSTANCE_ID, n->instance_id.data, sizeof(n->instance_id.data)) != VU_OK ||
        vu_client_open_back_channel(n->client) != VU_OK ||
        vu_client_serve_until(n->client, &n->window_mapped, "the doorbell window") != VU_OK) {
        error_propagate(errp, vu_client_take_error(n->client));
        return false;
    }
    n->memory = vu_memory_new(n->client, n->name, errp);
    if (!n->memory) {
        return false;
    }
    for (i = 0; i < n->n_vrings; i++) {
        if (vu_client_vring_call(n->client, i, &n->vrings[i].call) != VU_OK ||
            vu_client_vring_kick(n->client, i, &n->vrings[i].kick) != VU_OK) {
            break;
        }
    }
    if (i < n->n_vrings || !enable_vrings(n)) {
        error_propagate(errp, vu_client_take_error(n->client));
        return false;
    }
    return true;
}

/* Undoes what there is of nvme_realize. */
static void nvme_undo(VhostUserNvme *n)
{
    PCIDevice *pci = PCI_DEVICE(n);

    nvme_vectors_from_kvm(n);
    vu_memory_free(n->memory);
    n->memory = NULL;
    vu_client_free(n->client);
    n->client = NULL;
    n->fence = NULL;
    n->window_mapped = false;
    if (n->gone_bh) {
        qemu_bh_delete(n->gone_bh);
        n->gone_bh = NULL;
    }
    side_unmap(n);
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
    FrontendPage page;

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
    n->gone_bh = qemu_bh_new_guarded(nvme_gone_bh, n, &DEVICE(n)->mem_reentrancy_guard);
    qemu_uuid_generate(&n->instance_id);

    n->client = vu_client_connect(n->socket, n->connect_timeout, n->reply_timeout, &nvme_client_ops, n, errp);
    if (!n->client || !read_shape(n, &page, errp) || !nvme_vrings_init(n, errp) || !make_pci(n, &page, errp) ||
        !attach(n, errp)) {
        if (n->client) {
            error_prepend(errp, "'%s': ", n->socket);
        }
        nvme_undo(n);
        return;
    }
    vu_client_start(n->client);
}

static void nvme_exit(PCIDevice *pci)
{
    VhostUserNvme *n = VHOST_USER_NVME(pci);

    /* When this is answered nothing is on its way into the guest's memory any more. */
    if (vu_client_alive(n->client)) {
        vu_client_reset(n->client);
    }
    show_doorbells(n, false);
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

    if (n->window && n->window->start) {
        call_rcu(n->window, window_unmap, rcu);
    } else {
        g_free(n->window);
    }
}

static const Property nvme_properties[] = {
    DEFINE_PROP_STRING("socket", VhostUserNvme, socket),
    DEFINE_PROP_UINT32("connect-timeout", VhostUserNvme, connect_timeout, 1000),
    DEFINE_PROP_UINT32("reply-timeout", VhostUserNvme, reply_timeout, 10000),
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
    object_class_property_set_description(oc, "connect-timeout",
                                          "how long to wait for the daemon to listen and to take this front-end, in ms");
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
