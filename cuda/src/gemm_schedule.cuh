// Which part of the GEMM a CTA computes, and when (persistent). The first `split_tiles` tiles are cut into slices and
// shared out evenly, in contiguous runs; the sums of those who share a tile are added in the order of k, so the result
// does not depend on timing. The other tiles are a whole number of rounds, one tile per cluster.
#pragma once

#include "gemm_params.h"

namespace higgs::cuda {

// Slices [begin, end) of a tile.
struct Segment {
  int tile = 0;
  int begin = 0;
  int end = 0;
};

// The segments of a cluster, in order.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const GemmParams& p, int cluster)
      : split_(first_slice(p, cluster)), split_end_(first_slice(p, cluster + 1)), tile_(p.split_tiles + cluster) {}

  static __device__ __forceinline__ int first_slice(const GemmParams& p, int cluster) {
    return cluster * p.slices_per_cluster + min(cluster, p.longer_clusters);
  }
  // The inverse, for a slice of the shared tiles.
  static __device__ __forceinline__ int cluster_of(const GemmParams& p, int slice) {
    const int longer = p.longer_clusters * (p.slices_per_cluster + 1);
    return slice < longer ? slice / (p.slices_per_cluster + 1)
                          : p.longer_clusters + (slice - longer) / p.slices_per_cluster;
  }
  __device__ __forceinline__ bool next(const GemmParams& p, Segment& s) {
    if (split_ < split_end_) {
      s.tile = split_ / p.slices;
      s.begin = split_ - s.tile * p.slices;
      s.end = min(p.slices, s.begin + split_end_ - split_);
      split_ += s.end - s.begin;
      return true;
    }
    s = {tile_, 0, p.slices};
    tile_ += p.clusters;
    return s.tile < p.tiles;
  }

 private:
  int split_;
  int split_end_;
  int tile_;
};

// The place of a CTA in the grid.
struct CtaPlace {
  int cluster = 0;
  int rank = 0;
};

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
