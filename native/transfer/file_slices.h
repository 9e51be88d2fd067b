// Rows of tensors out of checkpoint files and into them. Reading, the file is mapped, rows are widened to float32 on
// the way, nothing is held twice. Writing, the file has its full length already, and several ranks may write their rows
// and columns of one tensor at the same time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lockstep::transfer {

enum class StoredType : uint8_t { kFloat32, kBFloat16, kFloat16 };

// A read-only mapping of a whole file. Throws Error("CHECKPOINT_UNREADABLE").
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  const char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// A file that exists, open for writing at any place. Throws Error("CHECKPOINT_WRITE_FAILED") with path, operation,
// place and the system's reason.
class FileToFill {
 public:
  explicit FileToFill(std::string path);
  ~FileToFill();
  FileToFill(const FileToFill&) = delete;
  FileToFill& operator=(const FileToFill&) = delete;

  void write(int64_t offset, const void* data, size_t bytes) const;

 private:
  std::string path_;
  int file_;
};

// A matrix in a file: `rows` logical rows of `columns`; transposed: the file holds [columns, rows].
struct FileTensor {
  std::string name;
  int64_t offset;
  StoredType type;
  int64_t rows, columns;
  bool transposed;
};

// Rows row .. row + count - 1 as float32 [count, columns]. Throws Error("CHECKPOINT_CORRUPT") outside the file and
// Error("CHECKPOINT_NOT_FINITE") on NaN or infinity, naming tensor, row and column.
void readRows(const MappedFile&, const std::string& path, const FileTensor&, int64_t row, int64_t count, float* out);

// Columns columnBegin .. columnBegin + columnCount - 1 of rows row .. row + count - 1, from float32 [count,
// columnCount]. The tensor is stored in float32.
void writeRows(const FileToFill&, const FileTensor&, int64_t row, int64_t count, int64_t columnBegin,
               int64_t columnCount, const float* data);

}  // namespace lockstep::transfer
