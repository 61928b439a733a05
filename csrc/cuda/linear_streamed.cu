// y = x W^T for small batches on compute capability 9.0: the weights stream through shared memory.
//
// One block a multiprocessor, whose warps have three duties:
//  - one thread orders copies of packed rows into a ring of stages;
//  - kWarps warps turn indices into values and multiply, a unit of the columns of 16 rows at a time. Two
//    neighbouring indices select one 32-bit entry of a table of all pairs of the row's values; in the
//    tensor core's layout lane l meets the rows l / 4 and l / 4 + 8 only, so that four copies of every
//    table give each lane a bank of its own;
//  - kServiceWarps warps fill the next tile's tables, multiply the sparse part, add the warps' sums and
//    write y, while the others go on.
// They meet on barriers in shared memory only. x stays in shared memory.
#include "tensor_copy.cuh"

namespace squeezellm_hf::cuda {
namespace {

constexpr int kRows = 16;  // of a tile: of the tensor core's left operand
constexpr int kWarps = 16;
constexpr int kServiceWarps = 4;
constexpr int kSumWarps = kWarps + kServiceWarps;  // that add to a tile's sums
// Whole warpgroups, to which registers are given by duty; one thread of the last orders the copies.
constexpr int kThreads = (kWarps + 2 * kServiceWarps) * kWarpLanes;
constexpr int kServiceRegisters = 128;
constexpr int kCopyRegisters = 24;
constexpr int kStageWarps = 4;                      // that share a stage: few, since the slowest one holds it
constexpr int kStageStride = kWarps / kStageWarps;  // from one stage of a warp to its next
constexpr int kMaxStages = 32;
constexpr int kSumBuffers = 2;    // tiles whose sums are in work at the same time
constexpr int kEntryBytes = 256;  // from one entry of a table to the next: 8 rows x 4 copies, twice
constexpr int kEarlyStages = 6;   // on their way before x
constexpr int kLeastRing = 6;     // stages without which too little is on its way
constexpr int kHeavyRow = 1024;   // sparse values of a row beyond which all service warps share it

// A unit is kLaneWords consecutive words for each of 4 lanes, a whole number of groups of 8 indices.
template <int kBits>
struct Unit {
  static constexpr int kLaneWords = kBits == 3 ? 6 : 4;
  static constexpr int kLoadBytes = kBits == 3 ? 8 : 16;
  static constexpr int kLaneLoads = kLaneWords * 4 / kLoadBytes;
  static constexpr int kLaneWeights = kLaneWords * 32 / kBits;
  static constexpr int kBytes = 4 * kLaneWords * 4;
  static constexpr int kWeights = 4 * kLaneWeights;
  static constexpr int kGroups = kLaneWeights / 8;
  static constexpr int kPairs = 1 << (2 * kBits);
  static constexpr int kStageBytes = kStageWarps * kBytes;  // of a row
  static constexpr int kStageWeights = kStageWarps * kWeights;
  static constexpr int kSlotBytes = kRows * kStageBytes;
};

// Weights are copied in boxes of 16 rows of 128 bytes, whose 16-byte pieces are turned by the row's number
// modulo 8. The rows that the lanes l / 4 take are chosen so that the lanes of a load meet different banks.
constexpr int kBoxRowBytes = 128;
constexpr int kBoxBytes = kRows * kBoxRowBytes;
template <int kBits>
__host__ __device__ constexpr int tile_row(int lane_row) {
  return kBits == 3 ? lane_row * 2 % 8 + lane_row / 4 : lane_row / 2 + lane_row % 2 * 4;
}
__host__ __device__ constexpr int box_offset(int row, int byte) {
  return byte / kBoxRowBytes * kBoxBytes + row * kBoxRowBytes + ((byte / 16 ^ row) % 8 * 16) + byte % 16;
}

// The ring starts where boxes may.
__host__ __device__ constexpr int ring_offset(int64_t bytes) { return static_cast<int>((bytes + 1023) / 1024 * 1024); }

// What the host decides: how shared memory is divided.
struct Plan {
  int stages;    // of a tile
  int ring;      // stages in shared memory: a multiple of kStageStride, so that a slot keeps its warps
  int x_stride;  // bytes between columns of x in shared memory
};

// With two buffers the next tile's tables are filled during the work on one; rows that leave too little
// room for the ring have one.
template <class T, int kBits, int kBatch, int kTableBuffers>
struct alignas(16) Shared {
  static constexpr int kBuffers = kTableBuffers;
  // Entry e of row r holds the values of the indices e % 2^bits (low half) and e / 2^bits, four times.
  struct Table {
    uint32_t pairs[Unit<kBits>::kPairs][2][8][4];
  } tables[kBuffers];
  float sums[kSumBuffers][kSumWarps][kBatch][kRows];
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t tables_full[kBuffers];
  uint64_t tables_empty[kBuffers];
  uint64_t sums_full[kSumBuffers];
  uint64_t sums_empty[kSumBuffers];
  uint64_t x_full;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Warps that add a tile's sums.
template <int kBatch>
constexpr int kFinishWarps = (kBatch * kRows + kWarpLanes - 1) / kWarpLanes;

// Position in the ring: a slot and the parity of its phase.
struct Slot {
  int index;
  uint32_t parity = 0;
  __device__ void advance(int steps, int ring) {
    index += steps;
    while (index >= ring) index -= ring, parity ^= 1;
  }
};

// Byte offset in a table of the entry for pair j of a lane's words. `base` is the lane's own offset and
// the table's, which do not meet the pair's bits; for 2 bits the table's is apart, in `nibbles_base`.
template <int kBits>
__device__ __forceinline__ uint32_t pair_offset(const uint32_t (&words)[Unit<kBits>::kLaneWords], int j, uint32_t base,
                                                uint32_t nibbles_base) {
  const int word = j * 2 * kBits / 32;
  const int shift = j * 2 * kBits % 32;
  const uint32_t bits = words[word];
  if constexpr (kBits == 4) {
    // One instruction: the pair's byte becomes the second byte.
    return __byte_perm(bits, base, 0x7604 | shift / 8 << 4);
  } else if constexpr (kBits == 2) {
    // The compiler shares the masked word among the four pairs at even (or odd) nibbles.
    const uint32_t nibbles = and_or(shift % 8 ? bits >> 4 : bits, 0x0F0F0F0F, nibbles_base);
    return __byte_perm(nibbles, base, 0x7604 | shift / 8 << 4);
  } else {
    constexpr uint32_t kMask = (Unit<kBits>::kPairs - 1) * kEntryBytes;
    const int next = min(word + 1, Unit<kBits>::kLaneWords - 1);
    if (shift + 2 * kBits > 32) return and_or(__funnelshift_r(bits, words[next], shift - 8), kMask, base);
    return and_or(shift >= 8 ? bits >> (shift - 8) : bits << (8 - shift), kMask, base);
  }
}

// Where x[k] of 8 consecutive k lies in its column, in pieces of 16 bytes: turned in every 128 bytes, so
// that the 4 lanes of a row, whose activations are 64 or 128 bytes apart, do not meet in a bank.
__device__ __forceinline__ int x_piece(int piece) { return piece ^ (piece >> 3 & 7); }

// All copies, for all tiles of the block: by one thread, whose addresses are thereby the same for its warp.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void order_copies(Shared<T, kBits, kBatch, kBuffers>& shared, unsigned char* ring,
                             const CUtensorMap& weights, const Plan& plan, int tiles) {
  using U = Unit<kBits>;
  Slot slot{0};
  int early = kEarlyStages;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      // x must not queue behind a whole ring.
      if (early-- == 0) wait(shared.x_full, 0);
      wait(shared.empty[slot.index], slot.parity ^ 1);
      unsigned char* target = ring + slot.index * U::kSlotBytes;
      uint64_t& full = shared.full[slot.index];
      arrive_expecting(full, U::kSlotBytes);
#pragma unroll
      for (int box = 0; box < U::kStageBytes / kBoxRowBytes; ++box) {
        const int byte = stage * U::kStageBytes + box * kBoxRowBytes;
        copy_tile(target + box * kBoxBytes, weights, byte / 4, tile * kRows, full);
      }
      slot.advance(1, plan.ring);
    }
  }
}

// What a thread needs to fill its part of a tile's tables, as it lies in memory: loaded a tile ahead.
// A job is 8 rows and 4 upper indices: of a row lane % 8 all values, and the value of upper index lane / 8.
template <int kBits>
struct TablePart {
  static constexpr int kEntries = 1 << kBits;
  static constexpr int kAllJobs = kRows / 8 * kEntries / 4;
  static constexpr int kJobs = (kAllJobs + kServiceWarps - 1) / kServiceWarps;  // of a warp
  uint32_t low[kJobs][kEntries / 2];                                            // pairs of 16-bit values
  uint32_t high[kJobs];

  __device__ static int half(int job) { return job / (kEntries / 4); }
  __device__ static int upper(int job, int lane) { return job % (kEntries / 4) * 4 + lane / 8; }
};

// Two neighbouring values of a table as T, whatever their dtype.
template <class T>
__device__ __forceinline__ uint32_t load_pair(const LutWeight& weight, int64_t first) {
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T value = from_float<T>(load_float(weight.lookup_table, weight.table_dtype, first + i));
    pair |= uint32_t{*reinterpret_cast<const uint16_t*>(&value)} << 16 * i;
  }
  return pair;
}

template <class T>
__device__ __forceinline__ uint32_t convert_pair(uint32_t pair, DType dtype) {
  uint32_t converted = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T value = from_float<T>(float_of_bits(pair >> 16 * i & 0xffff, dtype));
    converted |= uint32_t{*reinterpret_cast<const uint16_t*>(&value)} << 16 * i;
  }
  return converted;
}

// Whether rows of the tables can be read as vectors; otherwise they are converted where they are loaded.
__device__ __forceinline__ bool vector_tables(const LutWeight& weight) {
  return weight.table_dtype != DType::kFloat32 && reinterpret_cast<uintptr_t>(weight.lookup_table) % 16 == 0;
}

template <class T, int kBits>
__device__ void load_tables(TablePart<kBits>& part, const LutWeight& weight, int tile, int warp, int lane) {
  using Part = TablePart<kBits>;
  constexpr int kEntries = Part::kEntries;
  const bool vector = vector_tables(weight);
#pragma unroll
  for (int j = 0; j < Part::kJobs; ++j) {
    const int job = j * kServiceWarps + warp;
    if (job >= Part::kAllJobs) break;
    const int row = min(tile * kRows + Part::half(job) * 8 + tile_row<kBits>(lane % 8), weight.out_features - 1);
    const int64_t first = int64_t{row} * kEntries;
    uint32_t (&low)[kEntries / 2] = part.low[j];
    if (!vector) {
#pragma unroll
      for (int i = 0; i < kEntries / 2; ++i) low[i] = load_pair<T>(weight, first + 2 * i);
    } else if constexpr (kEntries == 4) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(weight.lookup_table) + first));
      low[0] = v.x, low[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kEntries / 8; ++i) {
        const uint4 v =
            __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(weight.lookup_table) + first) + i);
        low[4 * i] = v.x, low[4 * i + 1] = v.y, low[4 * i + 2] = v.z, low[4 * i + 3] = v.w;
      }
    }
    part.high[j] = load_bits(weight.lookup_table, weight.table_dtype, first + Part::upper(job, lane));
  }
}

template <class T, int kBits, int kBatch, int kBuffers>
__device__ void fill_tables(Shared<T, kBits, kBatch, kBuffers>& shared, const TablePart<kBits>& part,
                            const LutWeight& weight, int buffer, uint32_t parity, int warp, int lane) {
  using Part = TablePart<kBits>;
  constexpr DType kOwn = __is_same(T, __nv_bfloat16) ? DType::kBFloat16 : DType::kFloat16;
  const bool convert = vector_tables(weight) && weight.table_dtype != kOwn;
  wait(shared.tables_empty[buffer], parity ^ 1);
#pragma unroll
  for (int j = 0; j < Part::kJobs; ++j) {
    const int job = j * kServiceWarps + warp;
    if (job >= Part::kAllJobs) break;
    const T high = from_float<T>(float_of_bits(part.high[j], weight.table_dtype));
    const uint32_t high_bits = *reinterpret_cast<const uint16_t*>(&high);
#pragma unroll
    for (int i = 0; i < Part::kEntries; i += 2) {
      const uint32_t low = convert ? convert_pair<T>(part.low[j][i / 2], weight.table_dtype) : part.low[j][i / 2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t pair = __byte_perm(low, high_bits, k ? 0x5432 : 0x5410);
        const int entry = Part::upper(job, lane) * Part::kEntries + i + k;
        *reinterpret_cast<uint4*>(shared.tables[buffer].pairs[entry][Part::half(job)][lane % 8]) =
            make_uint4(pair, pair, pair, pair);
      }
    }
  }
  __syncwarp();
  if (lane == 0) arrive(shared.tables_full[buffer]);
}

// The sparse part of a tile by the service warps, each its own rows: lane l keeps the ends of row l, and
// the first entries of the warp's rows are loaded a tile ahead.
template <class T, int kBatch>
struct SparsePart {
  static constexpr int kWarpRows = kRows / kServiceWarps;
  const LinearCall& call;
  const unsigned char* x;  // in shared memory
  int x_stride;
  int warp;
  int lane;
  int2 rows = {0, 0};
  int2 next_rows = {0, 0};
  int2 own[kWarpRows];  // the warp's; empty where a row is left to all warps

  // Entries of the warp's rows, a lane's each, as they lie in memory: nothing is done with what is loaded,
  // lest one load wait for another. There is at least one entry in all.
  struct Entries {
    uint32_t columns[kWarpRows];
    uint32_t values[kWarpRows];
  } first;

  __device__ void load_rows(int tile) {
    const int row = tile * kRows + lane % kRows;
    next_rows = {0, 0};
    if (row < call.weight.out_features) next_rows = {call.weight.crow_indices[row], call.weight.crow_indices[row + 1]};
  }

  __device__ void load(Entries& entries, int ahead) const {
    const LutWeight& weight = call.weight;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int entry = own[i].x + ahead < own[i].y ? own[i].x + ahead : 0;
      entries.columns[i] = weight.wide_columns ? __ldg(static_cast<const uint32_t*>(weight.col_indices) + entry)
                                               : __ldg(static_cast<const uint16_t*>(weight.col_indices) + entry);
      entries.values[i] = load_bits(weight.values, weight.values_dtype, entry);
    }
  }

  // Goes on to the tile whose rows were loaded.
  __device__ void load_first() {
    rows = clamped_sparse_row(call.weight, next_rows);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int r = i * kServiceWarps + warp;
      own[i] = {__shfl_sync(0xffffffff, rows.x, r), __shfl_sync(0xffffffff, rows.y, r)};
      if (own[i].y - own[i].x > kHeavyRow) own[i] = {0, 0};
    }
    load(first, lane);
  }

  __device__ void add(float (&total)[kBatch], uint32_t column, uint32_t value) const {
    column = min(column, call.weight.in_features - 1u);
    const float factor = float_of_bits(value, call.weight.values_dtype);
    const unsigned char* source = x + x_piece(column / 8) * 16 + column % 8 * 2;
#pragma unroll
    for (int n = 0; n < kBatch; ++n)
      if (n < call.batch) total[n] += factor * to_float(*reinterpret_cast<const T*>(source + n * x_stride));
  }

  __device__ void add(float (&totals)[kWarpRows][kBatch], const Entries& entries, int ahead) const {
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i)
      if (own[i].x + ahead < own[i].y) add(totals[i], entries.columns[i], entries.values[i]);
  }

  // The sums of the warp's rows in `sums`, zeros for the others.
  __device__ void multiply(float (&sums)[kBatch][kRows]) const {
    float totals[kWarpRows][kBatch] = {};
    add(totals, first, lane);
    int longest = 0;
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) longest = max(longest, own[i].y - own[i].x);
    for (int ahead = kWarpLanes; ahead < longest; ahead += 2 * kWarpLanes) {
      Entries more[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) load(more[i], ahead + i * kWarpLanes + lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) add(totals, more[i], ahead + i * kWarpLanes + lane);
    }
    float mine[kBatch] = {};  // of row `lane`
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) totals[i][n] += __shfl_xor_sync(0xffffffff, totals[i][n], distance);
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        if (lane == i * kServiceWarps + warp) mine[n] = totals[i][n];
    }
    add_heavy_rows(mine);
    if (lane < kRows)
#pragma unroll
      for (int n = 0; n < kBatch; ++n) sums[n][lane] = mine[n];
  }

  // A share of every row that is left to all warps.
  __device__ void add_heavy_rows(float (&mine)[kBatch]) const {
    uint32_t heavy = __ballot_sync(0xffffffff, lane < kRows && rows.y - rows.x > kHeavyRow);
    for (; heavy != 0; heavy &= heavy - 1) {
      const int r = __ffs(heavy) - 1;
      const int2 row = {__shfl_sync(0xffffffff, rows.x, r), __shfl_sync(0xffffffff, rows.y, r)};
      float total[kBatch] = {};
#pragma unroll 4
      for (int entry = row.x + warp * kWarpLanes + lane; entry < row.y; entry += kServiceWarps * kWarpLanes)
        add(total, sparse_column(call.weight, entry), load_bits(call.weight.values, call.weight.values_dtype, entry));
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          total[n] += __shfl_xor_sync(0xffffffff, total[n], distance);
        if (lane == r) mine[n] += total[n];
      }
    }
  }
};

// The sums of all warps, the bias and y, for one tile: by the first threads of some service warps.
template <class T, int kBatch>
__device__ void write_y(const float (&sums)[kSumWarps][kBatch][kRows], const LinearCall& call, int tile, int thread) {
  const int n = thread / kRows;
  const int row = tile * kRows + thread % kRows;
  if (n >= call.batch || row >= call.weight.out_features) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][n][thread % kRows];
  if (call.weight.crow_indices != nullptr)
#pragma unroll
    for (int w = kWarps; w < kSumWarps; ++w) sum += sums[w][n][thread % kRows];
  if (call.bias != nullptr) sum += load_float(call.bias, call.bias_dtype, row);
  static_cast<T*>(call.y)[int64_t{n} * call.weight.out_features + row] = from_float<T>(sum);
}

// The duties of the service warps, for all tiles of the block.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void serve(Shared<T, kBits, kBatch, kBuffers>& shared, const LinearCall& call, const unsigned char* x,
                      const Plan& plan, int tiles, int warp, int lane) {
  const LutWeight& weight = call.weight;
  const bool has_sparse = weight.crow_indices != nullptr;
  const int step = gridDim.x;
  const int first = blockIdx.x;
  TablePart<kBits> tables;
  SparsePart<T, kBatch> sparse{call, x, plan.x_stride, warp, lane};
  load_tables<T>(tables, weight, first, warp, lane);
  if (has_sparse) sparse.load_rows(first);
  fill_tables(shared, tables, weight, 0, 0, warp, lane);
  load_tables<T>(tables, weight, first + step, warp, lane);
  if (has_sparse) {
    sparse.load_first();
    sparse.load_rows(first + step);
  }
  wait(shared.x_full, 0);
  wait_for_previous_kernel();  // whose memory y may be

  int count = 0;
  for (int tile = first; tile < tiles; tile += step, ++count) {
    const int buffer = count % kSumBuffers;
    const uint32_t parity = count / kSumBuffers & 1;
    auto prepare_tables = [&] {
      if (tile + step < tiles)
        fill_tables(shared, tables, weight, (count + 1) % kBuffers, (count + 1) / kBuffers & 1, warp, lane);
      load_tables<T>(tables, weight, tile + 2 * step, warp, lane);
    };
    // One buffer is free only when all warps are through with this tile.
    if (kBuffers > 1) prepare_tables();
    if (has_sparse) {
      wait(shared.sums_empty[buffer], parity ^ 1);
      sparse.multiply(shared.sums[buffer][kWarps + warp]);
      __syncwarp();
      if (lane == 0) arrive(shared.sums_full[buffer]);
      sparse.load_first();
      sparse.load_rows(tile + 2 * step);
    }
    if (kBuffers == 1) prepare_tables();
    // The warps take turns at the end of a tile.
    const int turn = (warp + count) % kServiceWarps;
    if (turn < kFinishWarps<kBatch>) {
      wait(shared.sums_full[buffer], parity);
      write_y<T, kBatch>(shared.sums[buffer], call, tile, turn * kWarpLanes + lane);
      __syncwarp();
      if (lane == 0) arrive(shared.sums_empty[buffer]);
    }
  }
}

// x into shared memory by the consuming warps, zeros beyond its end.
template <class T, int kBits>
__device__ void load_x(unsigned char* x, uint64_t& x_full, const LinearCall& call, const Plan& plan) {
  const int pieces = call.weight.in_features / 8;
  const int padded_pieces = plan.stages * Unit<kBits>::kStageWeights / 8;
  wait_for_previous_kernel();
  for (int n = 0; n < call.batch; ++n) {
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const T*>(call.x) + int64_t{n} * call.weight.in_features);
#pragma unroll 4
    for (int i = threadIdx.x; i < padded_pieces; i += kWarps * kWarpLanes)
      *reinterpret_cast<uint4*>(x + n * plan.x_stride + x_piece(i) * 16) =
          i < pieces ? load_uncached(source + i) : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  if (threadIdx.x % kWarpLanes == 0) arrive(x_full);
  wait(x_full, 0);
}

template <int kBytes>
__device__ __forceinline__ void load_words(uint32_t* words, const unsigned char* source) {
  if constexpr (kBytes == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(source);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(source);
    words[0] = v.x, words[1] = v.y;
  }
}

// The duties of a consuming warp, for all tiles of the block.
template <class T, int kBits, int kBatch, int kBuffers>
__device__ void multiply_dense(Shared<T, kBits, kBatch, kBuffers>& shared, const unsigned char* ring,
                               const unsigned char* x, const LinearCall& call, const Plan& plan, int tiles, int warp,
                               int lane) {
  using U = Unit<kBits>;
  // With fewer than 8 columns each of the tensor core's takes every kSlices-th group of a lane's weights
  // and zeros for the others, which its registers keep holding: the sums of the columns are added.
  constexpr int kSlices = 8 / kBatch;
  constexpr int kLoads = (U::kGroups + kSlices - 1) / kSlices;
  const int unit = warp % kStageWarps;
  const int column = lane / 4 % kBatch;
  const int slice = column < call.batch ? lane / 4 / kBatch : -1;
  int word_offsets[U::kLaneLoads];
#pragma unroll
  for (int i = 0; i < U::kLaneLoads; ++i)
    word_offsets[i] =
        box_offset(tile_row<kBits>(lane / 4), unit * U::kBytes + (lane % 4 * U::kLaneLoads + i) * U::kLoadBytes);
  const int first_piece = (unit * U::kWeights + lane % 4 * U::kLaneWeights) / 8 + max(slice, 0);
  const unsigned char* lane_x[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) lane_x[i] = x + column * plan.x_stride + x_piece(first_piece + i * kSlices) * 16;
  uint4 activations[U::kGroups] = {};
  const auto* memory = reinterpret_cast<const unsigned char*>(&shared);

  Slot slot{warp / kStageWarps};
  int stage = slot.index;
  int count = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++count) {
    const int table = count % kBuffers;
    const int buffer = count % kSumBuffers;
    const uint32_t parity = count / kSumBuffers & 1;
    const uint32_t base = lane * 4 + (kBits == 2 ? 0 : table * static_cast<int>(sizeof(shared.tables[0])));
    const uint32_t nibbles_base = table * 0x10101010u;
    wait(shared.tables_full[table], count / kBuffers & 1);
    constexpr int kSums = 2;  // in turn, so that a product need not wait for the one before it
    float products[kSums][4] = {};
    for (; stage < plan.stages; stage += kStageStride) {
      wait(shared.full[slot.index], slot.parity);
      const unsigned char* source = ring + slot.index * U::kSlotBytes;
      uint32_t words[2][U::kLaneWords];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < U::kLaneLoads; ++i)
          load_words<U::kLoadBytes>(words[h] + i * U::kLoadBytes / 4, source + h * 8 * kBoxRowBytes + word_offsets[i]);
      __syncwarp();
      if (lane == 0) arrive(shared.empty[slot.index]);
      const int x_offset = stage * U::kStageWeights * 2;
#pragma unroll
      for (int i = 0; i < U::kGroups; ++i)
        if (slice == i % kSlices) activations[i] = *reinterpret_cast<const uint4*>(lane_x[i / kSlices] + x_offset);
#pragma unroll
      for (int i = 0; i < U::kGroups; ++i) {
        const uint4& b = activations[i];
        uint32_t pairs[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t offset = pair_offset<kBits>(words[h], 4 * i + j, base, nibbles_base);
            pairs[h][j] = *reinterpret_cast<const uint32_t*>(memory + h * (kEntryBytes / 2) + offset);
          }
        multiply_accumulate<T>(products[0], pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], b.x, b.y);
        multiply_accumulate<T>(products[1], pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3], b.z, b.w);
      }
      slot.advance(kStageStride, plan.ring);
    }
    stage -= plan.stages;
    __syncwarp();
    if (lane == 0) arrive(shared.tables_empty[table]);

    // A warp's sums over its columns' slices.
    wait(shared.sums_empty[buffer], parity ^ 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float even = products[0][2 * h] + products[1][2 * h];
      float odd = products[0][2 * h + 1] + products[1][2 * h + 1];
      if (kBatch == 1) even += odd;
#pragma unroll
      for (int distance = 2; distance * 2 >= (kBatch > 2 ? kBatch : 2) && kBatch < 8; distance /= 2) {
        even += __shfl_xor_sync(0xffffffff, even, distance);
        odd += __shfl_xor_sync(0xffffffff, odd, distance);
      }
      const int n = lane % 4 * 2;
      const int row = h * 8 + tile_row<kBits>(lane / 4);
      if (n < kBatch) shared.sums[buffer][warp][n][row] = even;
      if (n + 1 < kBatch) shared.sums[buffer][warp][n + 1][row] = odd;
    }
    __syncwarp();
    if (lane == 0) arrive(shared.sums_full[buffer]);
  }
}

template <class T, int kBits, int kBatch, int kBuffers>
__device__ void run_block(unsigned char* memory, const LinearCall& call, const CUtensorMap& weights, const Plan& plan) {
  auto& shared = *reinterpret_cast<Shared<T, kBits, kBatch, kBuffers>*>(memory);
  unsigned char* x = memory + sizeof(shared);
  unsigned char* ring = memory + ring_offset(sizeof(shared) + kBatch * plan.x_stride);
  const int tiles = (call.weight.out_features + kRows - 1) / kRows;
  const int lane = threadIdx.x % kWarpLanes;
  // The shuffle tells the compiler that a warp's lanes agree on it.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / kWarpLanes, 0);

  if (threadIdx.x == 0) {
    for (int i = 0; i < plan.ring; ++i) {
      initialize_barrier(shared.full[i], 1);
      initialize_barrier(shared.empty[i], kStageWarps);
    }
    for (int i = 0; i < kBuffers; ++i) {
      initialize_barrier(shared.tables_full[i], kServiceWarps);
      initialize_barrier(shared.tables_empty[i], kWarps);
    }
    for (int i = 0; i < kSumBuffers; ++i) {
      initialize_barrier(shared.sums_full[i], kWarps + (call.weight.crow_indices != nullptr ? kServiceWarps : 0));
      initialize_barrier(shared.sums_empty[i], kFinishWarps<kBatch>);
    }
    initialize_barrier(shared.x_full, kWarps);
    fence_barriers();
  }
  __syncthreads();
  // The next kernel may start where this one's blocks have ended; until the previous one is complete,
  // only weights are read.
  allow_next_kernel();
  if (warp < kWarps) {
    load_x<T, kBits>(x, shared.x_full, call, plan);
    multiply_dense<T, kBits, kBatch, kBuffers>(shared, ring, x, call, plan, tiles, warp, lane);
  } else if (warp < kWarps + kServiceWarps) {
    set_registers<kServiceRegisters, true>();
    serve<T, kBits, kBatch, kBuffers>(shared, call, x, plan, tiles, warp - kWarps, lane);
  } else {
    set_registers<kCopyRegisters, false>();
    if (warp == kWarps + kServiceWarps && elect_lane())
      order_copies<T, kBits, kBatch, kBuffers>(shared, ring, weights, plan, tiles);
  }
}

#endif

template <class T, int kBits, int kBatch, int kBuffers>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const LinearCall call, const __grid_constant__ CUtensorMap weights, const Plan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) unsigned char memory[];
  run_block<T, kBits, kBatch, kBuffers>(memory, call, weights, plan);
#endif
}

// The ring is empty where x does not fit.
template <class T, int kBits, int kBatch, int kBuffers>
Plan make_plan(const LinearCall& call) {
  using U = Unit<kBits>;
  Plan plan{};
  plan.stages = (call.weight.in_features + U::kStageWeights - 1) / U::kStageWeights;
  // Between columns of x: lest the lanes of a load meet in a bank.
  const int64_t x_stride = int64_t{plan.stages} * U::kStageWeights * 2 + (kBatch > 1 ? 128 / kBatch : 0);
  const int64_t used = sizeof(Shared<T, kBits, kBatch, kBuffers>) + kBatch * x_stride;
  const int64_t room = call.shared_memory - (used + 1023) / 1024 * 1024;
  if (room < 0) return plan;
  plan.x_stride = static_cast<int>(x_stride);
  plan.ring = static_cast<int>(room / U::kSlotBytes);
  if (plan.ring > kMaxStages) plan.ring = kMaxStages;
  plan.ring -= plan.ring % kStageStride;
  return plan;
}

template <class T, int kBits, int kBatch, int kBuffers>
cudaError_t launch(const LinearCall& call, const Plan& plan) {
  const auto kernel = streamed_kernel<T, kBits, kBatch, kBuffers>;
  const int bytes = call.shared_memory;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const LutWeight& weight = call.weight;
  CUtensorMap weights;
  const cudaError_t mapped =
      make_tensor_map({CU_TENSOR_MAP_DATA_TYPE_INT32, weight.qweight, static_cast<uint64_t>(weight.words_per_row),
                       static_cast<uint64_t>(weight.out_features), static_cast<uint64_t>(weight.words_per_row) * 4,
                       kBoxRowBytes / 4, kRows, CU_TENSOR_MAP_SWIZZLE_128B},
                      weights);
  if (mapped != cudaSuccess) return mapped;
  const int tiles = (weight.out_features + kRows - 1) / kRows;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = tiles < call.multiprocessors ? tiles : call.multiprocessors;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = call.stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call, weights, plan);
}

template <class T, int kBits, int kBatch>
cudaError_t launch(const LinearCall& call) {
  const Plan plan = make_plan<T, kBits, kBatch, 2>(call);
  if (plan.ring >= kLeastRing) return launch<T, kBits, kBatch, 2>(call, plan);
  if constexpr (kBits == 4) {
    const Plan one = make_plan<T, kBits, kBatch, 1>(call);
    if (one.ring >= kLeastRing) return launch<T, kBits, kBatch, 1>(call, one);
  }
  return linear_small_batch(call);
}

template <class T, int kBits>
cudaError_t launch_batch(const LinearCall& call) {
  if (call.batch == 1) return launch<T, kBits, 1>(call);
  if (call.batch == 2) return launch<T, kBits, 2>(call);
  if (call.batch <= 4) return launch<T, kBits, 4>(call);
  return launch<T, kBits, 8>(call);
}

template <class T>
cudaError_t launch_bits(const LinearCall& call) {
  switch (call.weight.bits) {
    case 2:
      return launch_batch<T, 2>(call);
    case 3:
      return launch_batch<T, 3>(call);
    case 4:
      return launch_batch<T, 4>(call);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

bool can_stream() {
  static const bool compiled = [] {
    cudaFuncAttributes attributes;
    const auto kernel = streamed_kernel<__half, 4, 1, 2>;
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return compiled;
}

cudaError_t linear_streamed(const LinearCall& call) {
  return call.dtype == DType::kFloat16 ? launch_bits<__half>(call) : launch_bits<__nv_bfloat16>(call);
}

}  // namespace squeezellm_hf::cuda
