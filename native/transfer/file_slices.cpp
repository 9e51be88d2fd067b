#include "transfer/file_slices.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

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

Error writeFailure(const std::string& path, const std::string& operation, int reason) {
  return {"CHECKPOINT_WRITE_FAILED", "Cannot write " + path + ": " + operation + ": " + std::strerror(reason) +
                                         ". Earlier checkpoints are intact: free space, or choose an output folder "
                                         "that can be written."};
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

FileToFill::FileToFill(std::string path) : path_(std::move(path)), file_(open(path_.c_str(), O_WRONLY | O_CLOEXEC)) {
  if (file_ < 0) throw writeFailure(path_, "open", errno);
}

FileToFill::~FileToFill() {
  close(file_);
}

void FileToFill::write(int64_t offset, const void* data, size_t bytes) const {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = pwrite(file_, from, bytes, offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw writeFailure(path_, "pwrite at byte " + std::to_string(offset), errno);
    from += written;
    offset += written;
    bytes -= static_cast<size_t>(written);
  }
}

void writeRows(const FileToFill& file, const FileTensor& t, int64_t row, int64_t count, int64_t columnBegin,
               int64_t columnCount, const float* data) {
  constexpr int64_t kSize = sizeof(float);
  if (!t.transposed && columnCount == t.columns) {
    file.write(t.offset + row * t.columns * kSize, data, static_cast<size_t>(count * columnCount * kSize));
    return;
  }
  if (!t.transposed) {
    for (int64_t r = 0; r < count; ++r) {
      file.write(t.offset + ((row + r) * t.columns + columnBegin) * kSize, data + r * columnCount,
                 static_cast<size_t>(columnCount * kSize));
    }
    return;
  }
  std::vector<float> column(static_cast<size_t>(count));
  for (int64_t c = 0; c < columnCount; ++c) {
    for (int64_t r = 0; r < count; ++r) column[static_cast<size_t>(r)] = data[r * columnCount + c];
    file.write(t.offset + ((columnBegin + c) * t.rows + row) * kSize, column.data(),
               static_cast<size_t>(count * kSize));
  }
}

}  // namespace lockstep::transfer
