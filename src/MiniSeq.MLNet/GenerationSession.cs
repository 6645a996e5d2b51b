using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>A model in memory and how it is used. One caller at a time: ML.NET may come from several threads.</summary>
internal sealed class GenerationSession : IDisposable
{
    private readonly Lock _lock = new();
    private readonly IRowEncoder _prompts;
    private bool _disposed;

    /// <summary>Takes the model over: it is disposed with the session, and here if the settings do not fit it.</summary>
    public GenerationSession(CausalLM model, HuggingFaceTokenizer tokenizer, PipelineSettings settings, AdaptedCheckpoint? adapted = null)
    {
        (Model, Tokenizer, Settings, Adapted) = (model, tokenizer, settings, adapted);
        try
        {
            _prompts = settings.Encoder(tokenizer);
            _prompts.CheckRoom(settings.Generation.MaxNewTokens); // said before training, not at the first row
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    public CausalLM Model { get; }

    public HuggingFaceTokenizer Tokenizer { get; }

    public PipelineSettings Settings { get; }

    /// <summary>The checkpoint below the model's adapter; null where there is no adapter.</summary>
    public AdaptedCheckpoint? Adapted { get; }

    public bool IsDisposed => Volatile.Read(ref _disposed);

    /// <summary>How often the model was asked to generate; tests count with it.</summary>
    public int Calls { get; private set; }

    /// <summary>The generated text of each document; empty where the prompt has no token.</summary>
    /// <param name="documents">Texts of the input column.</param>
    /// <param name="firstRow">The row of the first, for errors; −1 where they come from no data view.</param>
    /// <param name="cancellationToken">Looked at before each token.</param>
    public IReadOnlyList<string> Generate(IReadOnlyList<string> documents, long firstRow = -1, CancellationToken cancellationToken = default)
    {
        var options = Settings.Generation;
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, typeof(MiniSeqTransformer));
            Calls++;
            int[][] prompts = [.. documents.Select((d, i) => Prompt(d, firstRow < 0 ? -1 : firstRow + i))];
            int[][] full = [.. prompts.Where(p => p.Length > 0)];
            // Drawn one by one, a text depends on its document and the seed only.
            var texts = options.DoSample
                ? full.SelectMany(p => Model.Generate([p], options, cancellationToken: cancellationToken))
                : Model.Generate(full, options, cancellationToken: cancellationToken);
            var written = new Queue<int[]>(texts);
            return [.. prompts.Select(p => p.Length == 0 ? "" : Written(written.Dequeue()))];
        }
    }

    private int[] Prompt(string document, long row)
    {
        try
        {
            return _prompts.Prompt(document, Settings.Generation.MaxNewTokens);
        }
        catch (ArgumentException e) when (row >= 0)
        {
            throw TextRows.InRow(row, e);
        }
    }

    // Some chat templates put spaces around an answer: they are not its text.
    private string Written(int[] ids) => Settings.ChatTemplate is null ? Tokenizer.Decode(ids) : Tokenizer.Decode(ids).Trim();

    public EvaluationResult Evaluate(IReadOnlyList<TokenSequence> sequences)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, typeof(MiniSeqTransformer));
            return Trainer.Evaluate(Model, sequences);
        }
    }

    /// <summary>Writes a Hugging Face folder: config.json, generation_config.json, weights, with the adapter merged into them, and tokenizer.</summary>
    public void SavePretrained(string folder) => Save(folder, () => Model.SavePretrained(folder, mergeAdapter: true));

    /// <summary>Writes a PEFT folder: adapter_config.json, adapter_model.safetensors, and, to use it by, tokenizer and generation_config.json.</summary>
    public void SaveAdapter(string folder)
    {
        if (File.Exists(Path.Combine(folder, "config.json"))) throw new InvalidOperationException($"'{folder}' holds a checkpoint: an adapter's tokenizer would overwrite its own. Choose another folder.");
        Save(folder, () => Model.SaveAdapter(folder));
    }

    private void Save(string folder, Action saveWeights)
    {
        lock (_lock)
        {
            ObjectDisposedException.ThrowIf(_disposed, typeof(MiniSeqTransformer));
            saveWeights();
            Tokenizer.SavePretrained(folder);
            GenerationConfig.Write(folder, Tokenizer, Settings.Generation, Settings.EndOfTurnTokenId(Tokenizer));
        }
    }

    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed) return;
            Volatile.Write(ref _disposed, true);
            Model.Dispose();
        }
    }
}
