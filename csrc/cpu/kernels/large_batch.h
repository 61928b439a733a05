// y = x W^T for larger batches: bound by arithmetic, so a few rows are decoded into a cache-sized
// tile that the whole batch uses.
//
// Both operands run along in_features, and every sum is a vector whose lanes are added at the end
// of a chunk: no transposition, and the order of additions depends on in_features alone.
// `Dot` gives the operands' type and the multiply-add: fp32, or bf16 pairs into fp32.
#pragma once

#include "decode.h"

namespace squeezellm_hf {

template <class Lanes, class Narrow, class Dot>
struct LargeBatch {
  using Float = typename Lanes::Float;
  using Element = typename Dot::Element;
  static constexpr int kTileBatch = 4;
  static constexpr int kTileRows = Lanes::kRegisters >= 32 ? 6 : 3;
  static constexpr int kRowBlock = 24;  // a multiple of kTileRows; y is written in runs of this
  // A chunk of 6 weight rows and 4 rows of x together stay in a 48 KB L1 cache.
  static constexpr int64_t kChunk = 4096 / static_cast<int64_t>(sizeof(Element));
  static constexpr int64_t kMaxBatchBlock = 128;
  static constexpr int64_t kBatchBlockBytes = 512 * 1024;  // of x: stays in L2

  // At least one vector, so that sums are set even without a single feature.
  static int64_t padded(int64_t n) { return n < 32 ? 32 : (n + 31) / 32 * 32; }

  static int64_t batch_block(const LinearCall& call) {
    const int64_t row = padded(call.weight.in_features) * static_cast<int64_t>(sizeof(Element));
    const int64_t fit = kBatchBlockBytes / row / kTileBatch * kTileBatch;
    return fit < 16 ? 16 : fit > kMaxBatchBlock ? kMaxBatchBlock : fit;
  }

  // Up to this batch the sparse part meets x itself, a vector of the batch an entry: cheaper than a
  // store into a tile that little else is done with.
  static constexpr int64_t kSparseBatch = 16;

  static bool separate_sparse(const LinearCall& call) {
    return call.weight.crow_indices != nullptr && call.batch <= kSparseBatch;
  }

  // x is read in place where it has the right type and rows end on a vector.
  static bool in_place(const LinearCall& call) {
    return call.dtype == Dot::kDType && call.weight.in_features == padded(call.weight.in_features);
  }

  static int64_t packed_bytes(const LinearCall& call) {
    if (in_place(call)) return 0;
    return call.batch * padded(call.weight.in_features) * static_cast<int64_t>(sizeof(Element));
  }

  // Packed x, then (where the sparse part is separate) x transposed: [in_features, kSparseBatch].
  static int64_t workspace_bytes(const LinearCall& call) {
    if (!separate_sparse(call)) return packed_bytes(call);
    return packed_bytes(call) + call.weight.in_features * kSparseBatch * static_cast<int64_t>(sizeof(float));
  }

  static float* transposed(const LinearCall& call) {
    return reinterpret_cast<float*>(static_cast<char*>(call.workspace) + packed_bytes(call));
  }

  static int64_t scratch_bytes(const LinearCall& call) {
    return kTileRows * padded(call.weight.in_features) * static_cast<int64_t>(sizeof(Element)) +
           kMaxBatchBlock * kRowBlock * static_cast<int64_t>(sizeof(float));
  }

  static void transpose(const LinearCall& call, int64_t begin, int64_t end) {
    constexpr int64_t kPiece = 256;
    const int64_t n = call.weight.in_features;
    const int64_t filled = end == call.batch ? kSparseBatch : end;
    float* out = transposed(call);
    float x[kPiece] = {};
    for (int64_t first = 0; first < n; first += kPiece) {
      const int64_t count = n - first < kPiece ? n - first : kPiece;
      for (int64_t b = begin; b < filled; ++b) {
        if (b < call.batch)
          load_floats(call.x, call.dtype, b * n + first, count, x);
        else
          for (int64_t i = 0; i < count; ++i) x[i] = 0;
        for (int64_t i = 0; i < count; ++i) out[(first + i) * kSparseBatch + b] = x[i];
      }
    }
  }

  static void pack_activations(const LinearCall& call, int64_t begin, int64_t end) {
    if (separate_sparse(call)) transpose(call, begin, end);
    if (in_place(call)) return;
    const int64_t n = call.weight.in_features;
    for (int64_t b = begin; b < end; ++b) {
      Element* out = static_cast<Element*>(call.workspace) + b * padded(n);
      Dot::convert(call, b * n, n, out);
      for (int64_t i = n; i < padded(n); ++i) out[i] = Element{};
    }
  }

  template <int kBatch>
  static void tile(const Element* x, const Element* w, int64_t stride, int64_t n, bool first, float* out) {
    Float sums[kBatch][kTileRows];
    for (auto& row : sums)
      for (auto& sum : row) sum = Lanes::zero();
    for (int64_t k = 0; k < n; k += Dot::kStep) {
      typename Dot::Vector weights[kTileRows];
      for (int r = 0; r < kTileRows; ++r) weights[r] = Dot::load(w + r * stride + k);
      for (int b = 0; b < kBatch; ++b) {
        const typename Dot::Vector xb = Dot::load(x + b * stride + k);
        for (int r = 0; r < kTileRows; ++r) sums[b][r] = Dot::multiply_add(weights[r], xb, sums[b][r]);
      }
    }
    for (int b = 0; b < kBatch; ++b)
      for (int r = 0; r < kTileRows; ++r) {
        const float sum = Lanes::reduce_add(sums[b][r]);
        float* to = out + b * kRowBlock + r;
        *to = first ? sum : *to + sum;
      }
  }

  static void linear_rows(const LinearCall& call, int64_t begin, int64_t end, void* scratch) {
    LutWeight weight = call.weight;
    if (separate_sparse(call)) weight.crow_indices = nullptr;  // the tile is of the dense part
    const int64_t n = weight.in_features;
    const int64_t stride = padded(n);
    const Element* packed = static_cast<const Element*>(in_place(call) ? call.x : call.workspace);
    Element* decoded = static_cast<Element*>(scratch);
    float* sums = reinterpret_cast<float*>(decoded + kTileRows * stride);
    for (int r = 0; r < kTileRows; ++r)
      for (int64_t i = n; i < stride; ++i) decoded[r * stride + i] = Element{};

    const int64_t block = batch_block(call);
    for (int64_t first_batch = 0; first_batch < call.batch; first_batch += block) {
      const int64_t batch = call.batch - first_batch < block ? call.batch - first_batch : block;
      const Element* x = packed + first_batch * stride;
      for (int64_t first_row = begin; first_row < end; first_row += kRowBlock) {
        const int64_t n_rows = end - first_row < kRowBlock ? end - first_row : kRowBlock;
        for (int64_t tile_row = 0; tile_row < n_rows; tile_row += kTileRows) {
          // A last tile of fewer rows keeps old rows in its tail; their sums are not stored.
          for (int r = 0; r < kTileRows; ++r) {
            Element* to = decoded + r * stride;
            if (tile_row + r < n_rows)
              decode_row<Lanes, Narrow>(weight, first_row + tile_row + r, kTileRows, to);
            else
              for (int64_t i = 0; i < n; ++i) to[i] = Element{};
          }
          for (int64_t k = 0; k < stride; k += kChunk) {
            const int64_t chunk = stride - k < kChunk ? stride - k : kChunk;
            for (int64_t b = 0; b < batch; b += kTileBatch) {
              const Element* xb = x + b * stride + k;
              const Element* w = decoded + k;
              float* out = sums + b * kRowBlock + tile_row;
              switch (batch - b) {
                case 1:
                  tile<1>(xb, w, stride, chunk, k == 0, out);
                  break;
                case 2:
                  tile<2>(xb, w, stride, chunk, k == 0, out);
                  break;
                case 3:
                  tile<3>(xb, w, stride, chunk, k == 0, out);
                  break;
                default:
                  tile<4>(xb, w, stride, chunk, k == 0, out);
              }
            }
          }
        }
        if (separate_sparse(call)) add_sparse_products(call, first_row, n_rows, sums);
        store(call, first_batch, batch, first_row, n_rows, sums);
      }
    }
  }

  static void add_sparse_products(const LinearCall& call, int64_t first_row, int64_t n_rows, float* sums) {
    const float* x = transposed(call);
    for (int64_t r = 0; r < n_rows; ++r) {
      float y[kSparseBatch] = {};
      for_each_entry(call.weight, first_row + r, [&](int64_t column, float value) {
        for (int64_t b = 0; b < kSparseBatch; ++b) y[b] += value * x[column * kSparseBatch + b];
      });
      for (int64_t b = 0; b < call.batch; ++b) sums[b * kRowBlock + r] += y[b];
    }
  }

  static void store(const LinearCall& call, int64_t first_batch, int64_t batch, int64_t first_row, int64_t n_rows,
                    float* sums) {
    float bias[kRowBlock] = {};
    if (call.bias != nullptr) load_floats(call.bias, call.bias_dtype, first_row, n_rows, bias);
    for (int64_t b = 0; b < batch; ++b) {
      float* y = sums + b * kRowBlock;
      for (int64_t r = 0; r < n_rows; ++r) y[r] += bias[r];
      store_floats(y, n_rows, call.y, call.dtype, (first_batch + b) * call.weight.out_features + first_row);
    }
  }
};

// fp32 operands, whatever the type of x.
template <class Lanes>
struct FloatDot {
  using Element = float;
  using Vector = typename Lanes::Float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kStep = Lanes::kLanes;
  static Vector load(const float* from) { return Lanes::load(from); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return Lanes::multiply_add(a, b, sum); }
  static void convert(const LinearCall& call, int64_t first, int64_t n, float* to) {
    load_floats(call.x, call.dtype, first, n, to);
  }
};

}  // namespace squeezellm_hf
