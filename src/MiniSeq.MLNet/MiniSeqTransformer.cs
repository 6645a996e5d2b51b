using Microsoft.ML;
using Microsoft.ML.Data;
using MiniSeq.Models;

namespace MiniSeq.MLNet;

/// <summary>A causal language model as a step of an ML.NET pipeline: adds a column with the text it writes after each document.</summary>
/// <remarks>
/// <c>Transform</c> is lazy: the model runs when the output column is read, on some rows at a time. May be used from several threads;
/// the model then runs for one of them at a time. Dispose frees the weights; a <c>PredictionEngine</c> disposes its
/// model unless it is made with <c>PredictionEngineOptions.OwnsTransformer = false</c>.
/// </remarks>
public sealed class MiniSeqTransformer : ITransformer, IDisposable
{
    private readonly MLContext _context;
    private readonly GenerationSession _session;
    private readonly string? _weightsFolder;

    internal MiniSeqTransformer(MLContext context, GenerationSession session, string? weightsFolder) =>
        (_context, _session, _weightsFolder) = (context, session, weightsFolder);

    /// <summary>The model itself. Do not train it while a pipeline uses it.</summary>
    public CausalLM Model => _session.Model;

    /// <summary>The model's tokenizer.</summary>
    public HuggingFaceTokenizer Tokenizer => _session.Tokenizer;

    /// <summary>Column of the document.</summary>
    public string InputColumnName => _session.Settings.InputColumnName;

    /// <summary>Column of the text it was trained to write; null if it learned the input text itself.</summary>
    public string? LabelColumnName => _session.Settings.LabelColumnName;

    /// <summary>Column of the generated text.</summary>
    public string OutputColumnName => _session.Settings.OutputColumnName;

    /// <summary>Always true: a row's text depends on that row only.</summary>
    public bool IsRowToRowMapper => true;

    internal GenerationSession Session => _session;

    /// <summary>What the model writes after one document.</summary>
    /// <param name="document">Cut at its end where it is too long. The JSON text of a dialogue where the model was trained on those.</param>
    /// <param name="cancellationToken">Looked at before each token.</param>
    public string Generate(string document, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(document);
        return _session.Generate([document], cancellationToken: cancellationToken)[0];
    }

    /// <summary>Writes the model as a Hugging Face folder: config.json, generation_config.json, model.safetensors, tokenizer. An adapter is merged into the weights written.</summary>
    /// <param name="folder">Made where it does not exist.</param>
    /// <exception cref="InvalidOperationException">The adapter is on the embedding or the head of a model where they are one matrix; or the folder is that of an adapter.</exception>
    public void SavePretrained(string folder)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        _session.SavePretrained(folder);
    }

    /// <summary>Writes the adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors, and beside them tokenizer and generation_config.json.</summary>
    /// <param name="folder">Made where it does not exist.</param>
    /// <exception cref="InvalidOperationException">The model has no adapter, or the folder is that of a checkpoint.</exception>
    public void SaveAdapter(string folder)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        _session.SaveAdapter(folder);
    }

    /// <inheritdoc/>
    /// <exception cref="ArgumentOutOfRangeException">The input column is missing or holds no text.</exception>
    public DataViewSchema GetOutputSchema(DataViewSchema inputSchema) => Bind(inputSchema).Output;

    /// <inheritdoc/>
    /// <exception cref="ArgumentOutOfRangeException">The input column is missing or holds no text.</exception>
    public IDataView Transform(IDataView input)
    {
        ArgumentNullException.ThrowIfNull(input);
        return new GeneratedTextView(_session, input, Bind(input.Schema));
    }

    /// <inheritdoc/>
    public IRowToRowMapper GetRowToRowMapper(DataViewSchema inputSchema) => new GeneratedTextMapper(_session, Bind(inputSchema));

    // The context's own members are internal: built-in transformers that carry the state write themselves.
    void ICanSaveModel.Save(ModelSaveContext ctx)
    {
        var manifest = Manifest.Write(_session, _weightsFolder);
        ((ICanSaveModel)SavedPipeline.Build(_context, _session.Settings, manifest.ToJson())).Save(ctx);
    }

    /// <summary>Frees the weights.</summary>
    public void Dispose() => _session.Dispose();

    internal CausalLMMetrics Evaluate(IDataView data, string? label, string? input)
    {
        var settings = _session.Settings;
        var rows = TextRows.Read(data, input ?? InputColumnName, label ?? LabelColumnName, settings.Encoder(Tokenizer), CancellationToken.None);
        var score = _session.Evaluate(rows.Sequences);
        return new CausalLMMetrics(score.Loss, score.Accuracy, score.TargetCount);
    }

    private ColumnBinding Bind(DataViewSchema schema)
    {
        ArgumentNullException.ThrowIfNull(schema);
        return new ColumnBinding(schema, TextRows.Column(schema, "input", InputColumnName), OutputColumnName);
    }
}
