"""Old chunks as tokens that are made once, below the layers: the mean of a chunk, or learned tokens that read it.

An event sees the events of its own chunk and of the `window_chunks` before it, and a token of every older closed chunk;
a token sees the tokens up to its own. Blocks, positions and gates are those of `Network` (one kind of token, so events
and chunk tokens share projections): what differs from summary attention is where a summary comes from. There each layer
makes it anew from its chunk and the summaries before it; here it is fixed before the first layer.

- `mean-pooled` (after KuaiFormer, arXiv 2411.10057): the mean of the chunk's event inputs. KuaiFormer pools coarser
  the older, by 64 and by 16; here every chunk has `chunk_size` events.
- `segment-tokens` (after PerSRec): `summaries_per_chunk` learned tokens attend to the chunk's event inputs in one
  block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_ksa.baselines.padded import Pack, PaddedNetwork, attend
from recsys_ksa.config import ModelConfig
from recsys_ksa.errors import ConfigError
from recsys_ksa.model.block import Block
from recsys_ksa.model.features import FeatureSchema
from recsys_ksa.model.rotary import Rotary, rotary_table, summary_position

# Shapes: U users, N events, C closed chunks of the longest, m tokens a chunk, L = N + C m tokens, E model dim, H heads.


class ChunkTokenNetwork(PaddedNetwork):
    """Blocks over events and chunk tokens; subclasses make the tokens."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the network with random parameters."""
        super().__init__(config, features)
        self.blocks = nn.ModuleList(Block(config, "full") for _ in config.layers)

    def chunk_tokens(self, chunks: Tensor) -> Tensor:
        """Return the tokens of chunks, [R, k, E] -> [R, m, E]."""
        raise NotImplementedError

    def read(self, events: Tensor, asked: Tensor | None, pack: Pack) -> Tensor:
        """Return what each event's row knows after it; see `PaddedNetwork.read`."""
        users, size, dim = events.shape
        k, m = self.config.chunk_size, self.config.summaries_per_chunk
        count = size // k
        chunks = events[:, : count * k].reshape(users * count, k, dim)
        tokens = self.chunk_tokens(chunks).view(users, count * m, dim) if count else events[:, :0]
        x = torch.cat((events, tokens), dim=1)

        index = torch.arange(count, device=events.device).repeat_interleave(m)
        slot = torch.arange(m, device=events.device).repeat(count)
        place = pack.position[:, :1] + summary_position(index, slot, k, m)
        position = torch.cat((pack.position, place), dim=1).flatten()
        rotary = rotary_table(position, self.config.head_dim, x.dtype)
        visible = self._visible(pack, index)
        if asked is not None:
            asked = F.pad(asked, (0, 0, 0, count * m))
        for depth, module in enumerate(self.blocks, start=1):
            assert isinstance(module, Block)
            x = _run(module, x, asked if depth == len(self.blocks) else None, rotary, visible)
        return x[:, :size]

    def _visible(self, pack: Pack, token_chunk: Tensor) -> Tensor:
        """Return which token each token sees, bool [U, L, L]; every one sees itself."""
        size = pack.row.shape[1]
        event = torch.arange(size, device=pack.row.device)
        chunk = event // self.config.chunk_size
        old = chunk[:, None] - self.config.window_chunks
        event_event = (event[:, None] >= event) & (chunk >= old)
        event_token = token_chunk < old
        token_event = torch.zeros(len(token_chunk), size, dtype=torch.bool, device=event.device)
        token_token = token_chunk[:, None] >= token_chunk
        rule = torch.cat((torch.cat((event_event, event_token), 1), torch.cat((token_event, token_token), 1)))
        # Padding comes last and tokens of unclosed chunks are old for no real event: neither is seen by one.
        return rule.expand(len(pack.row), -1, -1)


class MeanPooled(ChunkTokenNetwork):
    """An old chunk is the mean of its events' inputs."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the network with random parameters.

        Raises:
            ConfigError: more than one token a chunk.
        """
        if config.summaries_per_chunk != 1:
            raise ConfigError(
                f"model.summaries_per_chunk: expected 1 with architecture mean-pooled, got "
                f"{config.summaries_per_chunk}: a chunk has one mean. Set it to 1."
            )
        super().__init__(config, features)

    def chunk_tokens(self, chunks: Tensor) -> Tensor:
        """Return the mean of each chunk, [R, k, E] -> [R, 1, E]."""
        return chunks.mean(dim=1, keepdim=True)


class SegmentTokens(ChunkTokenNetwork):
    """An old chunk is what learned tokens read in it."""

    def __init__(self, config: ModelConfig, features: FeatureSchema) -> None:
        """Create the network with random parameters."""
        super().__init__(config, features)
        self.tokens = nn.Parameter(torch.randn(config.summaries_per_chunk, config.dim))
        self.reader = Block(config, "full")

    def chunk_tokens(self, chunks: Tensor) -> Tensor:
        """Return the tokens after one block over each chunk alone, [R, k, E] -> [R, m, E]."""
        count, k, _ = chunks.shape
        tokens = self.tokens.to(chunks.dtype).expand(count, -1, -1)
        m = tokens.shape[1]
        x = torch.cat((chunks, tokens), dim=1)
        # Inside a chunk an event's place is its own, and a token stands behind them all.
        place = torch.cat((torch.arange(k, device=x.device), torch.full((m,), k, device=x.device)))
        rotary = rotary_table(place.repeat(count), self.config.head_dim, x.dtype)
        visible = torch.ones(1, k + m, k + m, dtype=torch.bool, device=x.device)
        return _run(self.reader, x, None, rotary, visible)[:, k:]


def _run(block: Block, x: Tensor, asked: Tensor | None, rotary: Rotary, visible: Tensor) -> Tensor:
    """Return all tokens after a block, [U, L, E]; keys and values never depend on `asked`."""
    users, size, dim = x.shape
    rows = block.event.keys_values(x.reshape(users * size, dim), rotary)
    x = x if asked is None else x + asked
    flat = x.reshape(users * size, dim)
    query, gate = block.event.queries(flat, rotary)
    query, key, value = (part.unflatten(0, (users, size)).transpose(1, 2) for part in (query, rows[:, 0], rows[:, 1]))
    seen = attend(query, key, value, visible)
    return block.finish(flat, seen.transpose(1, 2).flatten(0, 1), gate).view(users, size, dim)
