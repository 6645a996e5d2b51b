using MiniSeq.Layers;
using MiniSeq.Models;

namespace MiniSeq.Training;

/// <summary>
/// Turns dialogues into tokens with the loss on the assistant's turns: its answers, each with the token that ends it. A document with its
/// target text is a dialogue of one user turn and one answer.
/// </summary>
/// <remarks>
/// A dialogue that is too long is cut at the end of its longest system or user message, and then of the next longest where that is not
/// enough; of a document with a template around it, the document only. What the assistant says is never cut. May be used from several threads.
/// </remarks>
public sealed class DialogueEncoder
{
    private readonly ChatTemplate _template;
    private readonly string[] _prompt;
    private readonly int _maxLength;
    private int _truncated;

    /// <summary>An encoder.</summary>
    /// <param name="template">The model's own.</param>
    /// <param name="maxLength">The most tokens of a sequence.</param>
    /// <param name="promptTemplate">The user's message about a document: text with <see cref="DocumentEncoder.InputPlaceholder"/> once.</param>
    /// <exception cref="ArgumentException">The prompt template lacks the placeholder or holds it twice, or the length leaves no room for a document.</exception>
    public DialogueEncoder(ChatTemplate template, int maxLength, string promptTemplate = DocumentEncoder.InputPlaceholder)
    {
        ArgumentNullException.ThrowIfNull(template);
        ArgumentNullException.ThrowIfNull(promptTemplate);
        (_template, _maxLength, _prompt) = (template, maxLength, promptTemplate.Split(DocumentEncoder.InputPlaceholder));
        if (_prompt.Length != 2) throw new ArgumentException($"The prompt template must hold {DocumentEncoder.InputPlaceholder} once; it is \"{promptTemplate}\".", nameof(promptTemplate));
        int own = template.Encode(Dialogue("", null), addGenerationPrompt: true).InputIds.Length;
        if (maxLength <= own + 1)
            throw new ArgumentException($"A maximum length of {maxLength} tokens leaves no room for a document: the templates alone take {own}.", nameof(maxLength));
    }

    /// <summary>Dialogues cut so far.</summary>
    public int TruncatedCount => _truncated;

    /// <summary>A dialogue as a training example: loss on the assistant's turns only (<paramref name="assistantOnlyLoss"/>), or on everything.</summary>
    /// <param name="dialogue">With an answer, most often at its end; what follows the last one is read and not learned.</param>
    /// <param name="assistantOnlyLoss">Whether all else is masked (−100).</param>
    /// <exception cref="ArgumentException">No answer, roles that the template does not take, or answers that do not fit into the maximum length.</exception>
    public TokenSequence Encode(IReadOnlyList<ChatMessage> dialogue, bool assistantOnlyLoss = true)
    {
        ArgumentNullException.ThrowIfNull(dialogue);
        if (dialogue.Count > 0 && dialogue.All(message => message.Role != ChatMessage.Assistant))
            throw new ArgumentException("The dialogue has no message of the assistant to learn.", nameof(dialogue));
        return Labelled(Fit(dialogue, addGenerationPrompt: false, _maxLength), assistantOnlyLoss);
    }

    /// <summary>A document and what the assistant is to write about it as a training example.</summary>
    /// <param name="document">Any text: it goes into the prompt template, and that into the user's turn.</param>
    /// <param name="answer">The assistant's turn.</param>
    /// <param name="assistantOnlyLoss">Whether all else is masked (−100).</param>
    /// <exception cref="ArgumentException">The answer does not fit into the maximum length beside the templates.</exception>
    public TokenSequence Encode(string document, string answer, bool assistantOnlyLoss = true)
    {
        ArgumentNullException.ThrowIfNull(document);
        ArgumentNullException.ThrowIfNull(answer);
        return Labelled(Fit(document, answer, _maxLength), assistantOnlyLoss);
    }

    /// <summary>The prompt for the next answer, with room for <paramref name="reserve"/> tokens after it.</summary>
    /// <param name="dialogue">Where it ends with an answer, as training examples do, that is left out: the model is to write it.</param>
    /// <param name="reserve">Tokens.</param>
    /// <exception cref="ArgumentException">Roles that the template does not take, or the reserve leaves no room.</exception>
    public int[] Prompt(IReadOnlyList<ChatMessage> dialogue, int reserve)
    {
        ArgumentNullException.ThrowIfNull(dialogue);
        IReadOnlyList<ChatMessage> asked = dialogue is [.., { Role: ChatMessage.Assistant }] ? [.. dialogue.SkipLast(1)] : dialogue;
        return Fit(asked, addGenerationPrompt: true, _maxLength - reserve).InputIds;
    }

    /// <summary>The prompt of a document, with room for <paramref name="reserve"/> tokens after it.</summary>
    /// <exception cref="ArgumentException">The reserve leaves no room.</exception>
    public int[] Prompt(string document, int reserve)
    {
        ArgumentNullException.ThrowIfNull(document);
        return Fit(document, null, _maxLength - reserve).InputIds;
    }

    private ChatMessage[] Dialogue(string document, string? answer)
    {
        var user = new ChatMessage(ChatMessage.User, _prompt[0] + document + _prompt[1]);
        return answer is null ? [user] : [user, new ChatMessage(ChatMessage.Assistant, answer)];
    }

    private ChatTokens Fit(string document, string? answer, int room) =>
        Fit([document], texts => _template.Encode(Dialogue(texts[0], answer), addGenerationPrompt: answer is null), room);

    private ChatTokens Fit(IReadOnlyList<ChatMessage> dialogue, bool addGenerationPrompt, int room)
    {
        int[] cuttable = [.. Enumerable.Range(0, dialogue.Count).Where(i => dialogue[i].Role != ChatMessage.Assistant)];
        return Fit([.. cuttable.Select(i => dialogue[i].Content)], texts =>
        {
            var messages = dialogue.ToArray();
            foreach (var (i, text) in cuttable.Zip(texts)) messages[i] = messages[i] with { Content = text };
            return _template.Encode(messages, addGenerationPrompt);
        }, room);
    }

    // A text cut between two tokens may have some more tokens when it is encoded in its place: so until it fits.
    private ChatTokens Fit(string[] texts, Func<string[], ChatTokens> encode, int room)
    {
        var tokens = encode(texts);
        if (tokens.InputIds.Length <= room) return tokens;
        var ids = texts.Select(text => _template.EncodeContent(text).ToArray()).ToArray();
        while (tokens.InputIds.Length > room)
        {
            int longest = ids.Length == 0 ? -1 : Enumerable.Range(0, ids.Length).MaxBy(i => ids[i].Length);
            if (longest < 0 || ids[longest].Length == 0)
                throw new SequenceTooLongException($"The templates and what is never cut, the assistant's messages, take {tokens.InputIds.Length} tokens and {room} are left of the maximum length of {_maxLength}: raise it.");
            ids[longest] = ids[longest][..Math.Max(0, ids[longest].Length - (tokens.InputIds.Length - room))];
            texts[longest] = WholeCharacters(ids[longest]);
            tokens = encode(texts);
        }
        Interlocked.Increment(ref _truncated);
        return tokens;
    }

    private string WholeCharacters(int[] ids)
    {
        var decoder = _template.Tokenizer.CreateStreamDecoder(skipSpecialTokens: false);
        return string.Concat(ids.Select(decoder.Append));
    }

    private static TokenSequence Labelled(ChatTokens tokens, bool assistantOnlyLoss)
    {
        long[] ids = [.. tokens.InputIds.Select(i => (long)i)];
        return assistantOnlyLoss ? new TokenSequence(ids, [.. ids.Zip(tokens.AssistantMasks, (id, answer) => answer ? id : LinearCrossEntropy.IgnoreIndex)]) : new TokenSequence(ids);
    }
}
