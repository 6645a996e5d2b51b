using System.Diagnostics;
using System.Globalization;
using Microsoft.ML.Runtime;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.MLNet;

/// <summary>From options to a model in memory with its tokenizer: for training, and for use as it is.</summary>
internal static class SessionStart
{
    /// <summary>Loads or makes the model.</summary>
    /// <param name="options">Validated.</param>
    /// <param name="adapter">Folder of an adapter to load; null loads none.</param>
    /// <param name="seed">Of new weights, and of drawing texts where the options give none.</param>
    /// <param name="device">Where the model goes.</param>
    /// <param name="channel">Told how far loading is where it takes longer than a second.</param>
    public static GenerationSession Open(FineTuneOptions options, string? adapter, int seed, Device device, IChannel channel)
    {
        // The tokenizer and the configurations first: quick to read, and quick to be wrong.
        if (options.Model is { } folder) DecoderConfig.FromPretrained(folder);
        if (adapter is not null) LoraConfig.FromPretrained(adapter);
        var tokenizer = options.Tokenizer ?? HuggingFaceTokenizer.FromPretrained(options.Model!);
        int? endOfTurn = options.ChatTemplate is { } kind ? new ChatTemplate(tokenizer, kind).EndOfTurnTokenId : null;
        var below = options.Lora is null && adapter is null ? null : new AdaptedCheckpoint(options.Model!);
        if (options.Config is not null || options.Lora is not null) random.manual_seed(seed);
        var model = Model(options, tokenizer, device, channel);
        try
        {
            if (options.MaxLength > model.Config.MaxPositionEmbeddings)
                channel.Warning(MessageSensitivity.None, "{0}", $"MaxLength is {options.MaxLength}, and the model was made for texts of {model.Config.MaxPositionEmbeddings} tokens (max_position_embeddings): it may not know what to make of later positions");
            Adapt(model, options, adapter);
            var settings = Settings(options, model, [.. model.Config.EosTokenIds, .. tokenizer.EosTokenIds, .. endOfTurn is { } end ? new[] { end } : []], seed);
            return new GenerationSession(model, tokenizer, settings, below);
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    public static void Say(this IChannel channel, FormattableString message) =>
        channel.Info(MessageSensitivity.None, "{0}", message.ToString(CultureInfo.InvariantCulture));

    private static CausalLM Model(FineTuneOptions options, HuggingFaceTokenizer tokenizer, Device device, IChannel channel)
    {
        if (options.Config is { } config)
            return new CausalLM(config with { BosTokenId = tokenizer.BosTokenId, EosTokenIds = [.. tokenizer.EosTokenIds] }, options.Precision.Resolve(null, device), device);
        var dtype = options.Precision.Resolve(Checkpoint.StoredType(options.Model!), device);
        return Checkpoint.LoadPretrained(options.Model!, dtype, device, new LoadingProgress(channel, options.Model!));
    }

    private static void Adapt(CausalLM model, FineTuneOptions options, string? adapter)
    {
        if (adapter is not null) model.LoadAdapter(adapter);
        else if (options.Lora is { } lora) model.AddAdapter(lora with { BaseModelNameOrPath = lora.BaseModelNameOrPath ?? options.Model });
    }

    private static PipelineSettings Settings(FineTuneOptions options, CausalLM model, IEnumerable<int> eosTokenIds, int seed) => new()
    {
        InputColumnName = options.InputColumnName,
        OutputColumnName = options.OutputColumnName,
        LabelColumnName = options.LabelColumnName,
        PromptTemplate = options.PromptTemplate,
        ChatTemplate = options.ChatTemplate,
        DType = model.DType,
        CompletionOnlyLoss = options.CompletionOnlyLoss,
        MaxLength = options.MaxLength ?? model.Config.MaxPositionEmbeddings,
        InferenceBatchSize = options.InferenceBatchSize,
        Generation = options.Generation with
        {
            EosTokenIds = [.. (options.Generation.EosTokenIds ?? eosTokenIds).Distinct()],
            Seed = options.Generation.Seed ?? seed,
        },
    };

    /// <summary>Tells the log once a second, beginning after the first.</summary>
    private sealed class LoadingProgress(IChannel channel, string folder) : IProgress<(int Done, int Total)>
    {
        private readonly Stopwatch _clock = Stopwatch.StartNew();
        private long _told;

        public void Report((int Done, int Total) value)
        {
            long second = _clock.ElapsedMilliseconds / 1000;
            if (second <= _told) return;
            _told = second;
            channel.Say($"loading '{folder}': {value.Done} of {value.Total} tensors");
        }
    }
}
