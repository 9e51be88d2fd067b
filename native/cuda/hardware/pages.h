// Device memory by pages: addresses that stay while what lies behind them comes and goes (the driver's virtual memory
// management, reached through the runtime, so that nothing links against a driver).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace lockstep::cuda::pages {

struct Driver {
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) release = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) destroy = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) access = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  cudaError_t found = cudaSuccess;

  Driver() {
    const auto find = [this](auto& function, const char* name) {
      void* at = nullptr;
      cudaDriverEntryPointQueryResult result{};
      const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &at, 12000, cudaEnableDefault, &result);
      if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = cudaErrorInsufficientDriver;
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(at);
    };
    find(reserve, "cuMemAddressReserve");
    find(release, "cuMemAddressFree");
    find(create, "cuMemCreate");
    find(destroy, "cuMemRelease");
    find(map, "cuMemMap");
    find(unmap, "cuMemUnmap");
    find(access, "cuMemSetAccess");
    find(granularity, "cuMemGetAllocationGranularity");
  }
  static const Driver& get() {
    static const Driver driver;
    return driver;
  }
};

inline CUmemAllocationProp onDevice(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}
inline cudaError_t result(CUresult error) {
  return error == CUDA_SUCCESS               ? cudaSuccess
         : error == CUDA_ERROR_OUT_OF_MEMORY ? cudaErrorMemoryAllocation
                                             : cudaErrorUnknown;
}

inline cudaError_t grain(int device, size_t* bytes) {
  const Driver& driver = Driver::get();
  if (driver.found != cudaSuccess) return driver.found;
  const CUmemAllocationProp properties = onDevice(device);
  return result(driver.granularity(bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
}
inline cudaError_t reserve(char** address, size_t bytes) {
  CUdeviceptr at = 0;
  const CUresult error = Driver::get().reserve(&at, bytes, 0, 0, 0);
  *address = reinterpret_cast<char*>(at);
  return result(error);
}
inline cudaError_t map(int device, char* at, size_t bytes) {
  const Driver& driver = Driver::get();
  const CUmemAllocationProp properties = onDevice(device);
  const auto address = reinterpret_cast<CUdeviceptr>(at);
  CUmemGenericAllocationHandle handle{};
  if (const CUresult error = driver.create(&handle, bytes, &properties, 0); error != CUDA_SUCCESS) return result(error);
  CUresult error = driver.map(address, bytes, 0, handle, 0);
  driver.destroy(handle);  // stays as long as it is mapped
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  if (error == CUDA_SUCCESS) error = driver.access(address, bytes, &access, 1);
  return result(error);
}
inline cudaError_t clear(char* at, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(at, 0, bytes, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
}
// What one map() has made. Nothing in flight uses it.
inline cudaError_t unmap(char* at, size_t bytes) {
  return result(Driver::get().unmap(reinterpret_cast<CUdeviceptr>(at), bytes));
}
// All of what reserve() has given.
inline cudaError_t release(char* at, size_t bytes) {
  return result(Driver::get().release(reinterpret_cast<CUdeviceptr>(at), bytes));
}

}  // namespace lockstep::cuda::pages
