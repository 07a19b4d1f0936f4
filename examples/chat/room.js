// What both versions of the chat have in common.

export const ROOM = 'chat.lobby';
export const TYPING = 'typing.lobby';
export const TYPING_INTERVAL = 2000; // milliseconds between two signs that this user is typing
export const TYPING_SHOWN = 3000; // milliseconds for which such a sign is shown

export const timeOf = (at) => new Date(at).toLocaleTimeString([], { timeStyle: 'short' });
export const describeTypists = (names) => (names.length ? `${names.join(', ')} ${names.length > 1 ? 'are' : 'is'} typing …` : '');
