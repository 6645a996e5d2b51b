using Microsoft.ML;
using Microsoft.ML.Runtime;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>Trains a causal language model on a text column, or on one text column to write another.</summary>
/// <remarks>
/// <format type="text/markdown"><![CDATA[
/// ### Input and Output Columns
/// The input and the label column are [text](xref:Microsoft.ML.Data.TextDataViewType). The output column is text: what the model writes after the document.
/// Rows with an empty input or label, or with a label longer than the maximum length allows, are skipped in training and counted in the log. With `FineTuneOptions.ChatTemplate` rows are dialogues.
///
/// ### Characteristics
/// | | |
/// | -- | -- |
/// | Machine learning task | Text generation: summaries of very long documents, for one |
/// | Is normalization or caching required? | No; rows are read once, in the order of the data |
/// | Required NuGet in addition to Microsoft.ML | TorchSharp with a native backend, such as TorchSharp-cpu |
/// | Exportable to ONNX | No; the weights are saved as a Hugging Face folder |
///
/// ### Training Algorithm Details
/// AdamW on the exact gradient of the mean loss a label token; layers and loss run in mini-sequences ([arXiv 2407.15892](https://arxiv.org/abs/2407.15892)).
/// ]]></format>
/// </remarks>
public sealed class MiniSeqEstimator : IEstimator<MiniSeqTransformer>
{
    private readonly MLContext _context;
    private readonly FineTuneOptions _options;
    private readonly IHost _host;
    private readonly int _seed;

    internal MiniSeqEstimator(MLContext context, FineTuneOptions options)
    {
        (_context, _options) = (context, options.Copy());
        _options.Validate();
        if (_options.LabelColumnName is null) _options.PromptTemplate = DocumentEncoder.InputPlaceholder; // learned as it is, so continued as it is
        _host = ((IHostEnvironment)context).Register(nameof(MiniSeqEstimator));
        _seed = _options.Seed ?? _host.Rand.Next(); // here and not in Fit, so that fitting twice gives the same model twice
    }

    /// <summary>The schema with the output column added.</summary>
    /// <exception cref="ArgumentOutOfRangeException">The input or label column is missing or holds no text.</exception>
    public SchemaShape GetOutputSchema(SchemaShape inputSchema)
    {
        ArgumentNullException.ThrowIfNull(inputSchema);
        TextRows.Check(inputSchema, "input", _options.InputColumnName);
        if (_options.LabelColumnName is { } label) TextRows.Check(inputSchema, "label", label);
        return _context.Transforms.CopyColumns(_options.OutputColumnName, _options.InputColumnName).GetOutputSchema(inputSchema);
    }

    /// <summary>Trains a model.</summary>
    /// <param name="input">Read once.</param>
    /// <returns>The trained model: dispose it to free its memory.</returns>
    /// <exception cref="ArgumentOutOfRangeException">The input or label column is missing or holds no text.</exception>
    /// <exception cref="ArgumentException">No row to learn from, a dialogue that is none, or a
    /// chat template that is not the tokenizer's.</exception>
    /// <exception cref="FileNotFoundException">The checkpoint lacks a file.</exception>
    /// <exception cref="InvalidDataException">A file of the checkpoint is damaged.</exception>
    /// <exception cref="InvalidOperationException">There is no such GPU as the context asks for, and no fallback.</exception>
    /// <exception cref="NotFiniteNumberException">The loss is NaN or infinite; the message names the step.</exception>
    /// <exception cref="OperationCanceledException">The token of the options was cancelled.</exception>
    public MiniSeqTransformer Fit(IDataView input)
    {
        ArgumentNullException.ThrowIfNull(input);
        CheckColumns(input.Schema);
        if (_options.ValidationSet is { } validation) CheckColumns(validation.Schema);
        _options.CancellationToken.ThrowIfCancellationRequested();
        using var channel = _host.Start("Fine-tuning");
        var session = SessionStart.Open(_options, adapter: null, _seed, ComputeDevice.Of(_context), channel);
        try
        {
            Train(session, input, channel);
            return new MiniSeqTransformer(_context, session, _options.WeightsFolder);
        }
        catch
        {
            session.Dispose();
            throw;
        }
    }

    private void CheckColumns(DataViewSchema schema)
    {
        TextRows.Column(schema, "input", _options.InputColumnName);
        if (_options.LabelColumnName is { } label) TextRows.Column(schema, "label", label);
    }

    private void Train(GenerationSession session, IDataView input, IChannel channel)
    {
        channel.Say($"seed {_seed}, device {session.Model.Device}, {session.Model.DType}, {session.Model.parameters().Sum(p => p.numel()):N0} parameters, {session.Model.parameters().Where(p => p.requires_grad).Sum(p => p.numel()):N0} of them trained, at most {session.Settings.MaxLength} tokens a sequence");
        var documents = Read(session, input, "training", channel);
        var validation = _options.ValidationSet is { } rows ? Read(session, rows, "validation", channel) : null;
        var result = Trainer.Train(session.Model, documents, validation, _options.Training with { Seed = _seed }, new Reporter(channel, _options.Progress), _options.CancellationToken);
        channel.Say($"trained {result.Steps} steps, mean loss {result.TrainLoss:F4}{(result.StoppedEarly ? ", stopped early" : "")}");
    }

    private List<TokenSequence> Read(GenerationSession session, IDataView data, string use, IChannel channel)
    {
        var encoder = session.Settings.Encoder(session.Tokenizer);
        var (sequences, empty, tooLong) = TextRows.Read(data, _options.InputColumnName, _options.LabelColumnName, encoder, _options.CancellationToken);
        channel.Say($"{use} rows: {sequences.Count} with {sequences.Sum(s => (long)s.Length)} tokens, {sequences.Sum(s => s.TargetCount)} of them targets; {encoder.TruncatedCount} documents truncated; {empty} rows skipped for an empty text");
        if (sequences.Count == 0) throw new ArgumentException($"No {use} row is left: {empty} skipped for an empty text, {tooLong} because what is learned of them, which is never cut, takes more than the {session.Settings.MaxLength} tokens of MaxLength.", nameof(data));
        if (tooLong > 0)
            channel.Warning(MessageSensitivity.None, "{0}", $"{use} rows skipped because what is learned of them, which is never cut, takes more than the {session.Settings.MaxLength} tokens of MaxLength: {tooLong}");
        return sequences;
    }

    /// <summary>Each report to the log and to the user's own listener.</summary>
    private sealed class Reporter(IChannel channel, IProgress<TrainingProgress>? listener) : IProgress<TrainingProgress>
    {
        public void Report(TrainingProgress p)
        {
            if (p.Step > 0) channel.Say($"step {p.Step}/{p.TotalSteps}: loss {p.Loss:F4}, learning rate {p.LearningRate:G3}, {p.TokensPerSecond:F0} tokens/s, peak memory {p.PeakMemoryBytes >> 20} MiB");
            if (p.Evaluation is { } e) channel.Say($"step {p.Step}/{p.TotalSteps}: validation loss {e.Loss:F4}, perplexity {e.Perplexity:F3}, token accuracy {e.Accuracy:F4}");
            listener?.Report(p);
        }
    }
}
