// Which part of the GEMM a CTA computes, and when (persistent). `split_tiles` tiles are cut into slices and shared out
// evenly, in contiguous runs; the sums of those who share a tile are added in the order of k, so the result does not
// depend on timing. The other tiles are a whole number of rounds, one tile per cluster. Where k is split within
// clusters, a cluster has one tile, and each of its CTAs an equal share of the slices.
//
// The wgmma kernel begins with whole tiles: all clusters then read the same columns of x at the same time, from the L2.
#pragma once

#include "gemm_params.h"

namespace higgs::cuda {

// Slices [begin, end) of a tile.
struct Segment {
  int tile = 0;
  int begin = 0;
  int end = 0;
};

// The place of a CTA in the grid.
struct CtaPlace {
  int cluster = 0;
  int rank = 0;    // among the CTAs that take row blocks of a tile
  int k_rank = 0;  // among the parts of k
};

// The segments of a CTA, in order.
template <bool WholeFirst>
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const GemmParams& p, const CtaPlace& cta)
      : split_(first_slice(p, cta.cluster)),
        split_end_(first_slice(p, cta.cluster + 1)),
        tile_(first_whole(p) + cta.cluster) {
    if (p.k_split_log == 0) return;
    split_end_ = split_ + ((cta.k_rank + 1) * p.slices >> p.k_split_log);
    split_ += cta.k_rank * p.slices >> p.k_split_log;
  }

  // Tiles before the first one that is shared.
  static __device__ __forceinline__ int first_split(const GemmParams& p) {
    return WholeFirst ? p.tiles - p.split_tiles : 0;
  }
  // Of the shared tiles, numbered through.
  static __device__ __forceinline__ int first_slice(const GemmParams& p, int cluster) {
    return cluster * p.slices_per_cluster + min(cluster, p.longer_clusters);
  }
  // The inverse, for a slice of the shared tiles.
  static __device__ __forceinline__ int cluster_of(const GemmParams& p, int slice) {
    const int longer = p.longer_clusters * (p.slices_per_cluster + 1);
    return slice < longer ? slice / (p.slices_per_cluster + 1)
                          : p.longer_clusters + (slice - longer) / p.slices_per_cluster;
  }
  // False at the end of all, with a tile beyond the last.
  __device__ __forceinline__ bool next(const GemmParams& p, Segment& s) {
    const int whole_end = first_whole(p) + p.tiles - p.split_tiles;
    const bool whole = tile_ < whole_end;
    if (split_ < split_end_ && !(WholeFirst && whole)) {
      const int tile = split_ / p.slices;
      s.tile = first_split(p) + tile;
      s.begin = split_ - tile * p.slices;
      s.end = min(p.slices, s.begin + split_end_ - split_);
      split_ += s.end - s.begin;
      return true;
    }
    s = {whole ? tile_ : p.tiles, 0, p.slices};
    tile_ += p.clusters;
    return whole;
  }

 private:
  static __device__ __forceinline__ int first_whole(const GemmParams& p) { return WholeFirst ? 0 : p.split_tiles; }

  int split_;
  int split_end_;
  int tile_;
};

// The clusters that share a tile, in the order of k: `first`, where k begins, and `others` that follow.
struct Sharing {
  int first = 0;
  int others = 0;
};
template <typename Config>
__device__ __forceinline__ Sharing sharing_of(const GemmParams& p, int tile) {
  using Order = Schedule<Config::kWholeFirst>;
  const int slice = (tile - Order::first_split(p)) * p.slices;
  const int first = Order::cluster_of(p, slice);
  return {first, Order::cluster_of(p, slice + p.slices - 1) - first};
}

// Where a CTA's rows of a tile are: the part and the first row tile and token.
struct TilePlace {
  int part = 0;
  int row_tile = 0;
  int token = 0;
};

template <typename Config>
__device__ __forceinline__ TilePlace place_of(const GemmParams& p, const CtaPlace& cta, int tile) {
  TilePlace place;
  const int token_tile = tile / p.row_blocks;
  const int block = tile - token_tile * p.row_blocks;
  while (place.part + 1 < p.part_count && block >= p.parts[place.part + 1].first_row_block) ++place.part;
  place.row_tile =
      ((block - p.parts[place.part].first_row_block) * Config::kClusterSize + cta.rank) * Config::kRowTiles;
  place.token = token_tile * Config::kN;
  return place;
}

}  // namespace higgs::cuda
