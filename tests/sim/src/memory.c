// Device memory is a range of addresses that faults when the host touches it, with the bytes elsewhere. Pinned memory
// is mapped twice, so that the pages which the host sees can be closed while a copy is in flight. Ranges are never
// used again, so that a stale pointer never meets a newer allocation.
#include "sim.h"
#include <signal.h>

allocation_t *allocations;
static int unmapping; // freed allocations that queued work still uses

static int contains(const allocation_t *a, const char *pointer, size_t size) {
    return pointer >= a->base && size <= a->size && (size_t)(pointer - a->base) <= a->size - size;
}

allocation_t *allocation_at(const void *pointer, size_t size) {
    for (allocation_t *a = allocations; a; a = a->next)
        if (a->live && contains(a, pointer, size)) return a;
    return NULL;
}

// Also of memory that was freed while work on it was queued: the work itself still sees it.
char *store_of(const void *pointer, size_t size) {
    for (allocation_t *a = allocations; a; a = a->next)
        if (a->store && contains(a, pointer, size)) return a->store + ((const char *)pointer - a->base);
    return NULL;
}

// Also what was freed, and the rest of an allocation's last page.
int in_known_range(const char *pointer) {
    for (allocation_t *a = allocations; a; a = a->next)
        if (pointer >= a->base && pointer < a->base + a->mapped) return 1;
    return 0;
}

static void map_device(allocation_t *a) {
    int hidden = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    a->base = mmap(NULL, a->mapped + PAGE, PROT_NONE, hidden, -1, 0); // one page more: the next range never adjoins
    a->store = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void map_pinned(allocation_t *a) {
    int file = memfd_create("pinned", 0);
    if (file < 0 || ftruncate(file, a->mapped)) {
        a->base = a->store = MAP_FAILED;
    } else {
        a->base = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        a->store = mmap(NULL, a->mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    if (file >= 0) close(file);
}

CUresult allocate(size_t size, enum kind kind, unsigned flags, void **base) {
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    if (kind == DEVICE && counts.device_bytes + (double)size > settings.memory) return CUDA_ERROR_OUT_OF_MEMORY;
    allocation_t *a = calloc(1, sizeof *a);
    *a = (allocation_t){.size = size, .mapped = (size + PAGE - 1) & ~(PAGE - 1), .kind = kind, .live = 1};
    a->flags = flags;
    if (kind == DEVICE) map_device(a);
    else map_pinned(a);
    if (a->base == MAP_FAILED || a->store == MAP_FAILED) {
        free(a);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    memset(a->store, 0xFF, size); // NaN in every float type: what was never written shows
    a->next = allocations;
    allocations = a;
    *base = a->base;
    if (kind == DEVICE) counts.device++, counts.device_bytes += size;
    else counts.pinned++;
    return CUDA_SUCCESS;
}

static int in_use(const allocation_t *a) {
    for (access_t *access = a->accesses; access; access = access->next)
        if (done_ticket[access->stream] < access->ticket) return 1;
    return 0;
}

static void unmap(allocation_t *a) { // the bytes go, the addresses stay taken
    while (a->accesses) {
        access_t *access = a->accesses;
        a->accesses = access->next;
        free(access);
    }
    munmap(a->store, a->mapped);
    a->store = NULL;
    if (a->kind == PINNED) {
        mmap(a->base, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    }
}

void unmap_finished(void) {
    if (!unmapping) return;
    for (allocation_t *a = allocations; a; a = a->next)
        if (!a->live && a->store && !in_use(a)) {
            unmap(a);
            unmapping--;
        }
}

static int unwaited(const allocation_t *a) {
    for (access_t *access = a->accesses; access; access = access->next)
        if (host_clock.ticket[access->stream] < access->ticket) return 1;
    return 0;
}

// Never waits, unlike the real call: pycuda frees while it holds Python's lock, which queued work may need.
CUresult release(void *base, enum kind kind) {
    allocation_t *a = allocation_at(base, 1);
    if (!a || a->base != base || a->kind != kind) return CUDA_ERROR_INVALID_VALUE;
    if (unwaited(a)) {
        counts.hazards++;
        report("%s memory %p was freed with work on it that the host had not waited for",
               kind == DEVICE ? "device" : "pinned", base);
    }
    a->live = 0;
    if (kind == DEVICE) counts.device--, counts.device_bytes -= a->size;
    else counts.pinned--, mprotect(a->base, a->mapped, PROT_READ | PROT_WRITE);
    unmapping++;
    unmap_finished();
    return CUDA_SUCCESS;
}

// Close the pages of pinned memory that copies in flight use: all access while they write, writes while they read.
void reguard(allocation_t *a) {
    if (!settings.guard || a->kind != PINNED || !a->live) return;
    mprotect(a->base, a->mapped, PROT_READ | PROT_WRITE);
    for (int writes = 0; writes < 2; writes++) // writes last, as they close more
        for (access_t *access = a->accesses; access; access = access->next)
            if (access->writes == writes && host_clock.ticket[access->stream] < access->ticket) {
                char *low = a->base + (access->low & ~(PAGE - 1));
                char *high = a->base + ((access->high + PAGE - 1) & ~(PAGE - 1));
                mprotect(low, high - low, writes ? PROT_NONE : PROT_READ);
            }
}

static struct sigaction earlier_handler;

// Whether a fault on live pinned memory was met and the host may go on.
static int touched_pinned(allocation_t *a, const char *address) {
    size_t offset = address - a->base;
    for (access_t *access = a->accesses; access; access = access->next)
        if (access->low <= offset && offset < access->high && host_clock.ticket[access->stream] < access->ticket) {
            counts.violations++;
            report("the host touched byte %zu of pinned memory %p while %s on stream %d had not been waited for",
                   offset, (void *)a->base, access->what, access->stream);
            break;
        } // else it is only on the same page as a copy in flight, which is no fault of the host's
    mprotect(a->base, a->mapped, PROT_READ | PROT_WRITE); // counted once; closed again at the next copy
    return 1;
}

// A fault is met in the very thread that touched the memory. If that is this library itself, copying from an address
// that the caller made up, then the lock is held already and refused here: not ours to meet.
static void on_fault(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number, (void)context;
    const char *address = info->si_addr;
    int met = 0, ours = !pthread_mutex_lock(&lock);
    for (allocation_t *a = allocations; ours && a; a = a->next) {
        if (address < a->base || address >= a->base + a->mapped) continue;
        if (a->kind == PINNED && a->live) met = touched_pinned(a, address);
        else
            dprintf(2, "simulated CUDA: the host touched byte %zd of %s memory (%zu bytes)\n", address - a->base,
                    a->kind == DEVICE ? "device" : "freed pinned", a->size);
        break;
    }
    if (ours) pthread_mutex_unlock(&lock);
    if (!met) sigaction(SIGSEGV, &earlier_handler, NULL); // the instruction faults again, as it would have without us
}

void install_guard(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigaction(SIGSEGV, &action, &earlier_handler);
}
