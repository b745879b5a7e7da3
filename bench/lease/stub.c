/* A libcuda without a GPU: it says yes to what Triton asks of a driver, and refuses what the real one documents.
 *
 * Refused are tensor maps (CUDA Driver API, "Tensor Map Object Management"), grids, blocks and shared memory (CUDA C++
 * Programming Guide, "Technical Specifications per Compute Capability", 9.0). Not refused, since driver 580 accepts
 * them on an H200 although the documentation says otherwise: strides that are no multiples of one another, strides
 * that do not grow, and windows that overlap.
 *
 * cuGetErrorString says why, so Triton's exception does. STUB_LOG names a file that gets a line for each refusal, and
 * one with the counts when the process ends.
 */
#include "cuda.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SHARED_OPT_IN = 227 * 1024, SHARED_PER_SM = 228 * 1024, SHARED_DEFAULT = 48 * 1024, REGISTERS = 65536, SMS = 132 };

typedef struct {
  char name[128];
  unsigned dynamic_shared;
} Function;

static long launches, maps, refusals;
static char reason[512] = "not refused";

long stub_launches(void) { return launches; }
long stub_maps(void) { return maps; }
long stub_refusals(void) { return refusals; }

static void to_log(const char *kind, const char *text) {
  const char *path = getenv("STUB_LOG");
  FILE *file = path ? fopen(path, "a") : NULL;
  if (!file)
    return;
  fprintf(file, "%s %s\n", kind, text);
  fclose(file);
}

static CUresult refuse(const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  refusals++;
  to_log("refused", reason);
  return CUDA_ERROR_INVALID_VALUE;
}

__attribute__((destructor)) static void say_counts(void) {
  char text[96];
  snprintf(text, sizeof text, "launches %ld maps %ld refusals %ld", launches, maps, refusals);
  if (launches || maps)
    to_log("counts", text);
}

/* No device for the CUDA runtime, so PyTorch finds none and keeps to the CPU. */
CUresult cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }

CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = SHARED_OPT_IN;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = SHARED_PER_SM;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = SMS;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default:
    *value = REGISTERS;
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *made = calloc(1, sizeof *made);
  snprintf(made->name, sizeof made->name, "%s", name);
  made->dynamic_shared = SHARED_DEFAULT;
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function *of = (Function *)function;
  /* What a driver for CUDA 13.0 does not know yet: Triton 3.9 asks for more, and then does without. */
  if (attribute > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
    return CUDA_ERROR_INVALID_VALUE;
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value < 0 || value > SHARED_OPT_IN)
      return refuse("%s: %d bytes of shared memory, at most %d", of->name, value, SHARED_OPT_IN);
    of->dynamic_shared = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *number, CUfunction function, const CUlaunchConfig *config) {
  *number = 1;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  Function *of = (Function *)function;
  unsigned threads = c->blockDimX * c->blockDimY * c->blockDimZ;
  launches++;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ || c->gridDimX > 2147483647u || c->gridDimY > 65535u ||
      c->gridDimZ > 65535u)
    return refuse("%s: a grid of %u x %u x %u", of->name, c->gridDimX, c->gridDimY, c->gridDimZ);
  if (!threads || threads > 1024)
    return refuse("%s: a block of %u threads", of->name, threads);
  if (c->sharedMemBytes > of->dynamic_shared)
    return refuse("%s: %u bytes of shared memory, %u are allowed", of->name, c->sharedMemBytes, of->dynamic_shared);
  return CUDA_SUCCESS;
}

static unsigned bytes_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8:
    return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT32:
  case CU_TENSOR_MAP_DATA_TYPE_INT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
    return 4;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
    return 8;
  default:
    return 0; /* packed 4 and 6 bits: none of ours */
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  unsigned size = bytes_of(type);
  maps++;
  if (!size)
    return refuse("tensor map: data type %d", (int)type);
  if ((cuuint64_t)map % 64)
    return refuse("tensor map: it lies at %p, no multiple of 64", (void *)map);
  if (rank < 1 || rank > 5)
    return refuse("tensor map: rank %u", rank);
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return refuse("tensor map: interleave %d", (int)interleave);
  if ((cuuint64_t)address % 16)
    return refuse("tensor map: the tensor lies at %p, no multiple of 16", address);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32)
      return refuse("tensor map: size %u is %llu", i, (unsigned long long)sizes[i]);
    if (box[i] < 1 || box[i] > 256)
      return refuse("tensor map: box side %u is %u, not 1 to 256", i, box[i]);
    if (steps[i] < 1 || steps[i] > 8)
      return refuse("tensor map: element stride %u is %u, not 1 to 8", i, steps[i]);
  }
  for (unsigned i = 0; i + 1 < rank; i++)
    if (!strides[i] || strides[i] % 16 || strides[i] >= 1ull << 40)
      return refuse("tensor map: stride %u is %llu bytes, no multiple of 16 below 2^40", i + 1,
                    (unsigned long long)strides[i]);
  if (box[0] * size % 16)
    return refuse("tensor map: box rows of %u bytes, no multiple of 16", box[0] * size);
  unsigned widest[] = {256 * 8, 32, 64, 128};
  if ((unsigned)swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
    return refuse("tensor map: swizzle %d", (int)swizzle);
  if (box[0] * size > widest[swizzle])
    return refuse("tensor map: box rows of %u bytes under a swizzle of %u", box[0] * size, widest[swizzle]);
  int is_float = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float)
    return refuse("tensor map: NaN outside of data type %d", (int)type);
  return CUDA_SUCCESS;
}
