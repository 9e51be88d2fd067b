#include "transfer/file_slices.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "core/error.h"

namespace lockstep::transfer {

namespace {

float halfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  return std::bit_cast<float>(sign | (exponent + 112u) << 23 | fraction << 13);
}

float load(const char* at, StoredType type) {
  if (type == StoredType::kFloat32) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return type == StoredType::kBFloat16 ? toFloat(BFloat16{bits}) : halfToFloat(bits);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const auto fail = [&] { throw Error("CHECKPOINT_UNREADABLE", path + ": " + std::strerror(errno)); };
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail();
  struct stat status;
  if (fstat(file, &status) != 0) {
    close(file);
    fail();
  }
  bytes_ = status.st_size;
  void* memory = bytes_ == 0 ? nullptr : mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (memory == MAP_FAILED) fail();
  data_ = static_cast<const char*>(memory);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<char*>(data_), static_cast<size_t>(bytes_));
}

void readRows(const MappedFile& file, const std::string& path, const FileTensor& t, int64_t row, int64_t count,
              float* out) {
  const int64_t size = t.type == StoredType::kFloat32 ? 4 : 2;
  if (t.offset < 0 || row < 0 || row + count > t.rows || t.offset + t.rows * t.columns * size > file.bytes()) {
    throw Error("CHECKPOINT_CORRUPT", path + ": tensor '" + t.name + "' reaches beyond the end of the file (" +
                                          std::to_string(file.bytes()) + " bytes)");
  }
  const int64_t rowStride = t.transposed ? 1 : t.columns, columnStride = t.transposed ? t.rows : 1;
  for (int64_t r = 0; r < count; ++r) {
    const char* from = file.data() + t.offset + (row + r) * rowStride * size;
    for (int64_t c = 0; c < t.columns; ++c) {
      const float x = load(from + c * columnStride * size, t.type);
      if (!std::isfinite(x)) {
        throw Error("CHECKPOINT_NOT_FINITE", path + ": tensor '" + t.name + "' holds " +
                                                 (std::isnan(x) ? "NaN" : "an infinity") + " at row " +
                                                 std::to_string(row + r) + ", column " + std::to_string(c) +
                                                 "; every weight must be a finite number");
      }
      out[r * t.columns + c] = x;
    }
  }
}

}  // namespace lockstep::transfer
