/* A libcuda.so.1 that does nothing, for Triton's NVIDIA driver: modules load, kernels "run", and every launch is noted.
 *
 * A launch is noted as the device would see it: the grid, the shared memory, the stream and the bytes of each parameter,
 * whose sizes stand in the module (an ELF file, section .nv.info.KERNEL, attribute EIATTR_KPARAM_INFO). A call can be
 * told to fail. One thread at a time.
 */
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define MOST 64
#define EXPORT __attribute__((visibility("default")))

struct function {
    char name[256];
    unsigned parameters, size[MOST];
};

static char *launches;
static size_t used, room;
static struct {
    char call[64];
    int result;
} fails;
static int loads, quiet;

/* ---- What a test asks ---- */

/* From now on `call` returns `result`; "*" stands for every call that waits for the device's state. 0 ends it. */
EXPORT void driver_fail(const char *call, int result) {
    snprintf(fails.call, sizeof fails.call, "%s", call);
    fails.result = result;
}

/* A line for each launch: kernel, programs, threads, bytes of shared memory, stream, parameters in hexadecimal. */
EXPORT const char *driver_launches(void) { return launches ? launches : ""; }

/* How many modules were loaded. */
EXPORT int driver_loads(void) { return loads; }

/* From now on launches are not noted, which takes far longer than the launch itself. */
EXPORT void driver_be_quiet(void) { quiet = 1; }

EXPORT void driver_forget(void) {
    used = 0;
    loads = 0;
    if (launches) launches[0] = 0;
}

/* ---- What Triton asks ---- */

static CUresult result(const char *call) {
    return !strcmp(fails.call, call) || !strcmp(fails.call, "*") ? (CUresult)fails.result : CUDA_SUCCESS;
}

static void note(const char *text) {
    size_t length = strlen(text);
    if (used + length + 1 > room) {
        room = 2 * (used + length + 1);
        launches = realloc(launches, room);
        if (!launches) abort();
    }
    memcpy(launches + used, text, length + 1);
    used += length;
}

/* Reads the sizes of a kernel's parameters. */
static CUresult parameters_of(const char *module, struct function *f) {
    const Elf64_Ehdr *file = (const Elf64_Ehdr *)module;
    if (memcmp(file->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(module + file->e_shoff);
    const char *names = module + sections[file->e_shstrndx].sh_offset;
    char wanted[300];
    snprintf(wanted, sizeof wanted, ".nv.info.%s", f->name);
    for (int i = 0; i < file->e_shnum; i++) {
        if (strcmp(names + sections[i].sh_name, wanted)) continue;
        const unsigned char *at = (const unsigned char *)module + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at + 4 <= end) { /* format, attribute, two bytes that are a size (format 4) or a value */
            uint16_t size;
            memcpy(&size, at + 2, 2);
            if (at[0] == 4 && at[1] == 0x17) { /* index, ordinal and offset, a word whose upper bits are the size */
                uint16_t ordinal;
                uint32_t word;
                memcpy(&ordinal, at + 8, 2);
                memcpy(&word, at + 12, 4);
                if (ordinal >= MOST) return CUDA_ERROR_INVALID_IMAGE;
                f->size[ordinal] = word >> 18;
                if (ordinal >= f->parameters) f->parameters = ordinal + 1;
            }
            at += 4 + (at[0] == 4 ? size : 0);
        }
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)image; /* Triton keeps the image for as long as it needs its functions */
    if (result("cuModuleLoadData")) return result("cuModuleLoadData");
    loads++;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (result("cuModuleGetFunction")) return result("cuModuleGetFunction");
    struct function *f = calloc(1, sizeof *f); /* for the life of the process */
    if (!f) return CUDA_ERROR_OUT_OF_MEMORY;
    snprintf(f->name, sizeof f->name, "%s", name);
    *function = (CUfunction)f;
    return parameters_of((const char *)module, f);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
    if (result("cuLaunchKernelEx")) return result("cuLaunchKernelEx");
    if (quiet) return CUDA_SUCCESS;
    const struct function *f = (const struct function *)function;
    char text[512];
    snprintf(text, sizeof text, "%s (%u,%u,%u) (%u,%u,%u) %u %p %u", f->name, c->gridDimX, c->gridDimY, c->gridDimZ,
             c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, (void *)c->hStream, c->numAttrs);
    note(text);
    for (unsigned i = 0; i < f->parameters; i++) {
        note(" ");
        for (unsigned byte = 0; byte < f->size[i]; byte++) {
            snprintf(text, sizeof text, "%02x", ((unsigned char *)parameters[i])[byte]);
            note(text);
        }
    }
    note("\n");
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    static const struct {
        int result;
        const char *text;
    } known[] = {
        {2, "out of memory"},
        {200, "device kernel image is invalid"},
        {209, "no kernel image is available for execution on the device"},
        {700, "an illegal memory access was encountered"},
        {701, "too many resources requested for launch"},
        {710, "device-side assert triggered"},
        {719, "unspecified launch failure"},
        {900, "operation not permitted when stream is capturing"},
        {901, "operation failed due to a previous error during capture"},
    };
    *text = "unknown error";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].result == (int)error) *text = known[i].text;
    return CUDA_SUCCESS;
}

/* An H100. */
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch ((int)attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        default: *value = 1;
    }
    return result("cuDeviceGetAttribute");
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return result("cuFuncGetAttribute");
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return result("cuPointerGetAttribute");
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)&fails;
    return result("cuCtxGetCurrent");
}

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = 13010;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return result("cuFuncSetAttribute");
}
